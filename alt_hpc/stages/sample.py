"""sample: the policy writes G generations for each prompt of a shard, prompt group by group."""

from __future__ import annotations

from typing import Any

import numpy as np

from alt_hpc import data, engines, models, pieces
from alt_hpc.feedback import conditioning
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import RunFolder
from alt_hpc.stages import inputs


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Make one shard: a row per drawn prompt with its raw text, token ids and generations.

    Iteration 1 samples from the plain prompt, later ones conditioned on quantile 0.
    """
    config, k = folder.config(), piece.iteration
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    work = folder.attempt(piece, attempt)
    start, end = folder.shardings()[k].sample[piece.shard]
    prompts = data.drawn_prompts(folder, k, start, end)
    place = inputs.policy_folder(folder, k - 1)
    tokenizer = inputs.tokenizer(folder, place)
    ends = models.eos_ids(models.load_config(place), tokenizer)
    budget = inputs.prompt_budget(folder, place, config.sampling.max_new_tokens)
    longest, on = budget + config.sampling.max_new_tokens, inputs.device()
    engine = engines.load(place, config.sampling, config.policy.dtype, ends, longest, on)
    prefix = "" if k == 1 else conditioning(config.feedback.template, config.feedback.texts[0])
    rows: list[dict[str, Any]] = []
    each = config.sampling.generations
    work.progress(0, len(prompts) * each, "samples")
    for first in range(0, len(prompts), config.sampling.group):
        group = prompts[first : first + config.sampling.group]
        fitted = [models.fit_prompt(tokenizer, prefix, prompt, budget) for prompt in group]
        numbers = range(start + first, start + first + len(group))
        seeds = [row_seed(config.seed, k, number) for number in numbers]
        sampled = engine.sample([ids for ids, _ in fitted], seeds)
        for number, prompt, (_, lost), generations in zip(
            numbers, group, fitted, sampled, strict=True
        ):
            texts = [models.text_of(tokenizer, g.ids, ends) for g in generations]
            made = [
                {"ids": g.ids, "ended": g.ended, "text": text}
                for g, text in zip(generations, texts, strict=True)
            ]
            rows.append({"row": number, "prompt": prompt, "lost": lost, "generations": made})
        work.progress(len(rows) * each, len(prompts) * each, "samples")
    cut = sum(row["lost"] > 0 for row in rows)
    if cut:
        print(f"{piece}: {cut} of {len(rows)} prompts lost the end of their post (context full)")
    tokens = sum(len(g["ids"]) for row in rows for g in row["generations"])
    work.commit_rows(rows, inputs=sources, facts={"prompts_cut": cut, "tokens": tokens})


def row_seed(seed: int, iteration: int, row: int) -> int:
    """The seed of one drawn prompt: a function of (run seed, iteration, row) alone."""
    state = np.random.SeedSequence([seed, iteration, row]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))

"""sample: the policy writes G generations for each prompt of a shard, prompt group by group."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from alt_hpc import data, engines, models, pieces
from alt_hpc.feedback import conditioning
from alt_hpc.generate import Generation
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import RunFolder
from alt_hpc.stages import inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def make(groups: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        asked: collections.deque[list[dict[str, Any]]] = collections.deque()

        def entering() -> Iterator[engines.Group]:
            for group in groups:
                numbers = range(starts[group], starts[group + 1])
                texts = prompts[numbers.start - start : numbers.stop - start]
                fitted = [models.fit_prompt(tokenizer, prefix, text, budget) for text in texts]
                asked.append(
                    [
                        {"row": number, "prompt": text, "lost": lost}
                        for number, text, (_, lost) in zip(numbers, texts, fitted, strict=True)
                    ]
                )
                seeds = (row_seed(config.seed, k, number) for number in numbers)
                yield [(ids, seed) for (ids, _), seed in zip(fitted, seeds, strict=True)]

        for sampled in engine.sample(entering()):
            yield [
                row | {"generations": [_generation(tokenizer, ends, one) for one in generations]}
                for row, generations in zip(asked.popleft(), sampled, strict=True)
            ]

    starts = [*range(start, end, engine.together), end]
    rows = work.resumable(sources, starts, make, "samples", config.sampling.generations)
    cut = sum(row["lost"] > 0 for row in rows)
    if cut:
        print(f"{piece}: {cut} of {len(rows)} prompts lost the end of their post (context full)")
    tokens = sum(len(g["ids"]) for row in rows for g in row["generations"])
    work.commit_rows(rows, inputs=sources, facts={"prompts_cut": cut, "tokens": tokens})


def _generation(
    tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], one: Generation
) -> dict[str, Any]:
    return {"ids": one.ids, "ended": one.ended, "text": models.text_of(tokenizer, one.ids, ends)}


def row_seed(seed: int, iteration: int, row: int) -> int:
    """The seed of one drawn prompt: a function of (run seed, iteration, row) alone."""
    state = np.random.SeedSequence([seed, iteration, row]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))

"""evaluate: greedy summaries of held-out prompts, with reward, perplexity and length of each."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from alt_hpc import data, models, packed, pieces
from alt_hpc.feedback import conditioning
from alt_hpc.generate import continuation_logprobs, generate
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import RunFolder
from alt_hpc.stages import inputs


def variants(iteration: int, texts: list[str], template: str) -> dict[str, str]:
    """Name -> text in front of the prompt: the best feedback, the worst as control, plain at 0."""
    named = {"best": conditioning(template, texts[0]), "worst": conditioning(template, texts[-1])}
    return {"plain": "", **named} if iteration == 0 else named


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Make one shard of held-out prompts: a row per prompt and variant.

    Perplexity is exp of the mean token loss under the starting policy given the plain prompt,
    EOS excluded; null for an empty summary. Length counts tokens without EOS. Three models in
    turn, never three in memory.
    """
    config, k = folder.config(), piece.iteration
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    work = folder.attempt(piece, attempt)
    start, end = folder.shardings()[k].evaluate[piece.shard]
    prompts = data.held_out_prompts(folder, k, start, end)
    size = config.evaluation.group
    groups = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    starts = [*range(0, len(prompts), size), len(prompts)]
    made: list[list[dict[str, Any]]] = []  # by pass, a row per prompt

    def summarised(group: int) -> list[dict[str, Any]]:
        return made[0][starts[group] : starts[group + 1]]

    passes: tuple[Callable[[Iterator[int]], Iterator[list[dict[str, Any]]]], ...] = (
        lambda wanted: _summaries(folder, k, map(groups.__getitem__, wanted)),
        lambda wanted: _rewards(folder, map(summarised, wanted)),
        lambda wanted: _perplexities(folder, map(summarised, wanted)),
    )
    for number, make in enumerate(passes):
        made.append(work.resumable(sources, starts, make, "prompts", part=(number, len(passes))))
        gc.collect()  # the model of this pass
    flat = []
    for (split, number, text), *found in zip(prompts, *made, strict=True):
        row = {key: values for part in found for key, values in part.items()}
        for i, summary in enumerate(row["summaries"]):
            about = {"split": split, "row": number, "prompt": text, **summary}
            about |= {"reward": row["rewards"][i], "perplexity": row["perplexities"][i]}
            flat.append({key: value for key, value in about.items() if key not in ("kept", "lost")})
    cut = sum(any(s["lost"] for s in row["summaries"]) for row in made[0])
    work.commit_rows(flat, inputs=sources, facts={"prompts_cut": cut})


def _summaries(
    folder: RunFolder, iteration: int, groups: Iterable[list[tuple[str, int, str]]]
) -> Iterator[list[dict[str, Any]]]:
    """For each prompt of a group the greedy summary of each variant."""
    config = folder.config()
    settings = config.evaluation
    place = inputs.policy_folder(folder, iteration)
    tokenizer = inputs.tokenizer(folder, place)
    ends = models.eos_ids(models.load_config(place), tokenizer)
    policy = packed.pack(models.load_policy(place, config.policy.dtype, inputs.device()))
    budget = inputs.prompt_budget(folder, place, settings.max_new_tokens)
    kinds = variants(iteration, config.feedback.texts, config.feedback.template)
    for group in groups:
        rows: list[dict[str, Any]] = [{"prompt": text, "summaries": []} for _, _, text in group]
        for name, prefix in kinds.items():
            fitted = [models.fit_prompt(tokenizer, prefix, text, budget) for _, _, text in group]
            made = generate(
                policy,
                [ids for ids, _ in fitted],
                1,
                [0] * len(fitted),
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=settings.max_new_tokens,
                eos=ends,
            )
            for row, (one,), (_, lost) in zip(rows, made, fitted, strict=True):
                kept = [i for i in one.ids if i not in ends]
                text = models.text_of(tokenizer, kept, ends)
                row["summaries"].append(
                    {"variant": name, "text": text, "kept": kept, "lost": lost}
                    | {"length": len(kept), "ended": one.ended}
                )
        yield rows


def _rewards(
    folder: RunFolder, groups: Iterable[list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    model = inputs.reward_model(folder, inputs.device())
    for group in groups:
        rows = []
        for row in group:
            rewards, _ = model.score(row["prompt"], [s["text"] for s in row["summaries"]])
            rows.append({"rewards": [r if math.isfinite(r) else None for r in rewards]})
        yield rows


def _perplexities(
    folder: RunFolder, groups: Iterable[list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    config = folder.config()
    place = inputs.policy_folder(folder, 0)
    tokenizer = inputs.tokenizer(folder, place)
    policy = packed.pack(models.load_policy(place, config.policy.dtype, inputs.device()))
    budget = inputs.prompt_budget(folder, place, config.evaluation.max_new_tokens)
    for group in groups:
        rows = []
        for row in group:
            ids, _ = models.fit_prompt(tokenizer, "", row["prompt"], budget)
            losses = continuation_logprobs(policy, ids, [s["kept"] for s in row["summaries"]])
            found = [math.exp(-sum(one) / len(one)) if one else None for one in losses]
            rows.append({"perplexities": found})
        yield rows

"""evaluate: greedy summaries of held-out prompts, with reward, perplexity and length of each."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from alt_hpc import packed
from alt_hpc.data import draws
from alt_hpc.feedback import conditioning
from alt_hpc.generate import continuation_logprobs, generate
from alt_hpc.stages.work import Work, load_reward_model

Rows = list[dict[str, Any]]


def variants(iteration: int, texts: list[str], template: str) -> dict[str, str]:
    """Name -> text in front of the prompt: the best feedback, the worst as control, plain at 0."""
    named = {"best": conditioning(template, texts[0]), "worst": conditioning(template, texts[-1])}
    return {"plain": "", **named} if iteration == 0 else named


def run(work: Work) -> None:
    """Make one shard of held-out prompts: a row per prompt and variant.

    Perplexity is exp of the mean token loss under the starting policy given the plain prompt,
    EOS excluded; null for an empty summary. Length counts tokens without EOS. Three models in
    turn, never three in memory.
    """
    prompts = draws.held_out_prompts(work.run, work.piece)
    size = work.config.evaluation.group
    texts = [text for _, _, text in prompts]
    groups = [texts[first : first + size] for first in range(0, len(texts), size)]
    starts = [*range(0, len(texts), size), len(texts)]
    made: list[Rows] = []  # by pass, a row per prompt

    def summarised(group: int) -> Rows:
        return made[0][starts[group] : starts[group + 1]]

    passes: tuple[Callable[[Iterator[int]], Iterator[Rows]], ...] = (
        lambda wanted: _summaries(work, map(groups.__getitem__, wanted)),
        lambda wanted: _rewards(work, map(summarised, wanted)),
        lambda wanted: _perplexities(work, map(summarised, wanted)),
    )
    for number, make in enumerate(passes):
        part = number, len(passes)
        made.append(work.attempt.resumable(starts, make, "prompts", part=part))
        gc.collect()  # the model of this pass
    flat = []
    for (split, number, text), *found in zip(prompts, *made, strict=True):
        row = {key: values for part in found for key, values in part.items()}
        for i, summary in enumerate(row["summaries"]):
            about = {"split": split, "row": number, "prompt": text, **summary}
            about |= {"reward": row["rewards"][i], "perplexity": row["perplexities"][i]}
            flat.append({key: value for key, value in about.items() if key not in ("kept", "lost")})
    cut = sum(any(s["lost"] for s in row["summaries"]) for row in made[0])
    work.attempt.commit_rows(flat, {"prompts_cut": cut})


def _summaries(work: Work, groups: Iterable[list[str]]) -> Iterator[Rows]:
    """For each prompt of a group the greedy summary of each variant."""
    config, k = work.config, work.piece.iteration
    new = config.evaluation.max_new_tokens
    policy = work.policy(k)
    model = packed.pack(policy.load(config.policy.dtype, work.device))
    kinds = variants(k, config.feedback.texts, config.feedback.template)
    for group in groups:
        rows: Rows = [{"prompt": text, "summaries": []} for text in group]
        for name, prefix in kinds.items():
            fitted = [policy.fit(prefix, text, new) for text in group]
            made = generate(
                model,
                [ids for ids, _ in fitted],
                1,
                [0] * len(fitted),
                temperature=0.0,
                top_p=1.0,
                max_new_tokens=new,
                eos=policy.ends,
            )
            for row, (one,), (_, lost) in zip(rows, made, fitted, strict=True):
                kept = [i for i in one.ids if i not in policy.ends]
                row["summaries"].append(
                    {"variant": name, "text": policy.text(kept), "kept": kept, "lost": lost}
                    | {"length": len(kept), "ended": one.ended}
                )
        yield rows


def _rewards(work: Work, groups: Iterable[Rows]) -> Iterator[Rows]:
    model = load_reward_model(work.run, work.device)
    for group in groups:
        rows = []
        for row in group:
            rewards, _ = model.score(row["prompt"], [s["text"] for s in row["summaries"]])
            rows.append({"rewards": [r if math.isfinite(r) else None for r in rewards]})
        yield rows


def _perplexities(work: Work, groups: Iterable[Rows]) -> Iterator[Rows]:
    config = work.config
    policy = work.policy(0)
    model = packed.pack(policy.load(config.policy.dtype, work.device))
    for group in groups:
        rows = []
        for row in group:
            ids, _ = policy.fit("", row["prompt"], config.evaluation.max_new_tokens)
            losses = continuation_logprobs(model, ids, [s["kept"] for s in row["summaries"]])
            found = [math.exp(-sum(one) / len(one)) if one else None for one in losses]
            rows.append({"perplexities": found})
        yield rows

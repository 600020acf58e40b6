"""score: the reward rates a shard's generations, and the method labels each prompt's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from alt_hpc.rewards import Answers, Scored, Scorer
from alt_hpc.run.folder import RunFolder
from alt_hpc.stages.work import Work, scorer

Row = dict[str, Any]


def run(work: Work) -> None:
    """Make one shard: a row per prompt with what was decided of each generation.

    That is its reward (null where it is not finite), and the method's label: its quantile and
    feedback. Both are null where a generation, or a prompt with too few finite rewards, was set
    aside; and the label of the whole row where it is only decided over the iteration. The reward
    sees the plain prompt, never the conditioning.
    """
    samples = list(work.mates())
    reward = _scorer(work.run, work.device)

    def make(indices: Iterator[int]) -> Iterator[list[Row]]:
        asked: list[Row] = []

        def entering() -> Iterator[Answers]:
            for row in map(samples.__getitem__, indices):
                asked.append(row)
                yield Answers(row["prompt"], [g["text"] for g in row["generations"]], row)

        for scored in reward.score(entering()):
            yield [_decided(work, asked.pop(0), scored)]

    starts = range(work.rows.start, work.rows.stop + 1)
    rows = work.attempt.resumable(starts, make, "samples", work.config.sample.generations)
    cut = sum(row["post_cut"] for row in rows)
    aside = sum(row["quantiles"] is not None and not any_kept(row["quantiles"]) for row in rows)
    if aside:
        work.say(f"{aside} of {len(rows)} prompts set aside (too few finite rewards)")
    if cut:
        work.say(f"{cut} of {len(rows)} posts cut to the reward model's length")
    work.attempt.commit_rows(rows, {"set_aside": aside, "prompts_cut": cut})


@functools.lru_cache(maxsize=1)  # for all shards of a task
def _scorer(run: RunFolder, on: torch.device) -> Scorer:
    return scorer(run, run.config().reward, on)


def _decided(work: Work, sample: Row, scored: Scored) -> Row:
    """A scored row, as training reads it."""
    row: Row = {"row": sample["row"], "rewards": list(map(finite, scored.rewards))}
    if scored.parts:
        row["parts"] = {name: list(map(finite, part)) for name, part in scored.parts.items()}
    if scored.feedback is not None:
        row["written"] = list(scored.feedback)
    label = work.config.method.label(row)
    row["quantiles"] = None if label is None else list(label.quantiles)
    row["feedback"] = None if label is None else list(label.feedback)
    return row | {"post_cut": scored.shortened}


def finite(reward: float) -> float | None:
    return reward if math.isfinite(reward) else None


def any_kept(quantiles: list[int | None]) -> bool:
    return any(q is not None for q in quantiles)

"""score: the reward model ranks a shard's generations; each gets a quantile and its feedback."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from alt_hpc import feedback
from alt_hpc.stages.work import Work, load_reward_model

_reward_model = functools.lru_cache(maxsize=1)(load_reward_model)  # for all shards of a task


def run(work: Work) -> None:
    """Make one shard: a row per prompt with reward, quantile and feedback of each generation.

    Rewards that are not finite are written as null, with no quantile; so are all quantiles of a
    prompt with fewer finite rewards than quantiles (it is set aside and counted). The reward
    model sees the plain prompt, never the conditioning.
    """
    settings = work.config.feedback
    samples = list(work.mates())
    model = _reward_model(work.run, work.device)

    def make(indices: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for row in map(samples.__getitem__, indices):
            rewards, cut = model.score(row["prompt"], [g["text"] for g in row["generations"]])
            quantiles = feedback.quantiles(rewards, settings.quantiles, settings.remainder)
            yield [
                {
                    "row": row["row"],
                    "rewards": [r if math.isfinite(r) else None for r in rewards],
                    "quantiles": quantiles,
                    "feedback": [None if q is None else settings.texts[q] for q in quantiles],
                    "post_cut": cut,
                }
            ]

    starts = range(work.rows.start, work.rows.stop + 1)
    rows = work.attempt.resumable(starts, make, "samples", work.config.sampling.generations)
    cut = sum(row["post_cut"] for row in rows)
    aside = sum(all(q is None for q in row["quantiles"]) for row in rows)
    if aside:
        work.say(f"{aside} of {len(rows)} prompts set aside (too few finite rewards)")
    if cut:
        work.say(f"{cut} of {len(rows)} posts cut to the reward model's length")
    work.attempt.commit_rows(rows, {"set_aside": aside, "prompts_cut": cut})

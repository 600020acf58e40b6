"""score: the reward rates a shard's generations, and the method labels each prompt's."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from alt_hpc.rewards import Answers
from alt_hpc.stages.work import Work, scorer

Row = dict[str, Any]


def run(work: Work) -> None:
    """Make one shard: a row per prompt with what was decided of each generation.

    That is its reward (null where it is not finite; made from the plain prompt), whether it came
    to an end, and the method's label: its quantile and feedback, null where a generation, or a
    prompt with too few of them, was set aside, and for the row where the iteration decides.
    """
    samples = list(work.mates())
    reward = _scorer(work.run, work.device)

    def make(indices: Iterator[int]) -> Iterator[list[Row]]:
        asked, again = itertools.tee(map(samples.__getitem__, indices))  # it may take some ahead
        texts = (Answers(r["prompt"], [g["text"] for g in r["generations"]], r) for r in again)
        for sample, scored in zip(asked, reward.score(texts), strict=True):
            row: Row = {"row": sample["row"], "rewards": _finite(scored.rewards)}
            row["finished"] = [g["ended"] == "eos" for g in sample["generations"]]
            if scored.parts:
                row["parts"] = {name: _finite(part) for name, part in scored.parts.items()}
            if scored.feedback is not None:
                row["written"] = list(scored.feedback)
            label = work.config.method.label(row)
            row["quantiles"] = label and list(label.quantiles)
            row["feedback"] = label and list(label.feedback)
            yield [row | {"post_shortened": scored.shortened}]

    starts = range(work.rows.start, work.rows.stop + 1)
    rows = work.attempt.resumable(starts, make, "samples", work.config.sample.generations)
    shortened = sum(row["post_shortened"] for row in rows)
    aside = sum(row["quantiles"] is not None and set(row["quantiles"]) <= {None} for row in rows)
    if aside:
        work.say(f"{aside} of {len(rows)} prompts set aside (too few finite rewards)")
    if shortened:
        work.say(f"{shortened} of {len(rows)} posts shortened to the reward model's length")
    work.attempt.commit_rows(rows, {"set_aside": aside, "prompts_shortened": shortened})


# One for all shards of a task.
_scorer = functools.lru_cache(maxsize=1)(lambda run, on: scorer(run, run.config().reward, on))


def _finite(rewards: Sequence[float]) -> list[float | None]:
    return [reward if math.isfinite(reward) else None for reward in rewards]

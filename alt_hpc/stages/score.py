"""score: the reward rates a shard's generations, and the method labels each prompt's."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from alt_hpc.data import draws
from alt_hpc.methods import Method
from alt_hpc.rewards import Answers, judge
from alt_hpc.stages.work import Work, finite, scorer

Row = dict[str, Any]


def run(work: Work) -> None:
    """Make one shard: a row per prompt with what was decided of each generation.

    That is its reward (null where it is not finite; made from the plain prompt) and the parts of a
    sum, whether it came to an end, and the method's label: its quantile and feedback, null where a
    generation, or a prompt with too few of them, was set aside, and for the row where the
    iteration decides. What a judge has `written` of each, and in how many `tries`. `post` is the
    frozen prompt that was drawn.
    """
    samples, first = list(work.mates()), work.rows.start
    its = work.config.reward
    asks = any(isinstance(one, judge.Settings) for one in its.singles().values())
    # A judge's replies are kept with the piece; else one for all shards of a task.
    reward = work.scorer(its, "reward") if asks else _scorer(work.run, work.device)
    posts = work.run.draw(work.piece.iteration)["rows"]
    data = draws.frozen(work.run, work.piece)

    def answers(sample: Row) -> Answers:
        number, texts = sample["row"], [g["text"] for g in sample["generations"]]
        return Answers(sample["prompt"], texts, data[number - first], posts[number], "train")

    def make(indices: Iterator[int]) -> Iterator[list[Row]]:
        asked, again = itertools.tee(map(samples.__getitem__, indices))  # it may take some ahead
        for sample, scored in zip(asked, reward.score(map(answers, again)), strict=True):
            row: Row = {"row": sample["row"], "post": posts[sample["row"]]}
            row["rewards"] = finite(scored.rewards)
            row["finished"] = [g["ended"] == "eos" for g in sample["generations"]]
            if scored.parts:
                row["parts"] = {name: finite(part) for name, part in scored.parts.items()}
            if scored.feedback is not None:
                row["written"] = list(scored.feedback)
            if scored.tries is not None:
                row["tries"] = list(scored.tries)
            yield [labelled(row, work.config.method) | {"post_shortened": scored.shortened}]

    starts = range(work.rows.start, work.rows.stop + 1)
    rows = work.attempt.resumable(starts, make, "samples", work.config.sample.generations)
    found = facts(rows)
    if lost := found["answers_set_aside"]:
        count = sum(len(row["rewards"]) for row in rows)
        work.say(f"{lost} of {count} answers set aside (no finite reward)")
    if aside := found["set_aside"]:
        work.say(f"{aside} of {len(rows)} prompts set aside (too few finite rewards)")
    if shortened := found["prompts_shortened"]:
        work.say(f"{shortened} of {len(rows)} posts shortened to the reward model's length")
    found["tokens"] = sum(
        len(generation["ids"])
        for sample, row in zip(samples, rows, strict=True)
        for generation, reward in zip(sample["generations"], row["rewards"], strict=True)
        if reward is not None
    )
    work.attempt.commit_rows(rows, found)


def labelled(row: Row, method: Method) -> Row:
    """A scored row with the method's label, in the place of another's where it has one."""
    label = method.label(row)
    quantiles, feedback = label and list(label.quantiles), label and list(label.feedback)
    return row | {"quantiles": quantiles, "feedback": feedback}


def facts(rows: list[Row]) -> dict[str, int]:
    """How many prompts and answers of a shard were set aside, and how many posts lost text."""
    labels = [row["quantiles"] for row in rows]
    return {
        "set_aside": sum(one is not None and set(one) <= {None} for one in labels),
        "answers_set_aside": sum(reward is None for row in rows for reward in row["rewards"]),
        "prompts_shortened": sum(row["post_shortened"] for row in rows),
    }


_scorer = functools.lru_cache(maxsize=1)(lambda run, on: scorer(run, run.config().reward, on))

"""Draws of prompts: which rows an iteration samples from and is evaluated on, and its shards."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from alt_hpc.config import Config
from alt_hpc.data import texts
from alt_hpc.graph import (
    COMPARISONS,
    EVALUATE,
    JUDGE,
    OVER,
    OWN,
    REFERENCES,
    SAMPLE,
    TEST,
    VALID,
    Piece,
    Shard,
    Sharding,
    cut,
)
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder


def begin(run: RunFolder, iteration: int) -> None:
    """Draw an iteration's prompts and cut it into shards, if that has not been done.

    The draw is a function of (run seed, iteration): N rows of the train split, duplicates separate.
    Iteration 0 only evaluates. A set or policy that is evaluated only since is added to it.
    """
    planned = sharding(run, iteration)
    if run.graph().shardings.get(iteration) != planned:
        total = rows.count(run, texts.PROMPTS)
        run.begin(iteration, {"rows": drawn(run.config(), iteration, total)}, planned)


def drawn(config: Config, iteration: int, total: int) -> list[int]:
    """The rows of an iteration's draw from so many prompts, in order."""
    rng, sample = np.random.default_rng([config.seed, iteration]), config.sample
    found: list[int] = rng.choice(
        total, sample.prompts if iteration else 0, sample.replacement
    ).tolist()
    return found


def written(run: RunFolder, iteration: int) -> dict[str, Any]:
    """An iteration's draw and how it is cut: as it began, or as it would begin now."""
    if iteration in run.graph().shardings:
        return run.draw(iteration)
    now, total = sharding(run, iteration), rows.count(run, texts.PROMPTS)
    shards = [astuple(shard) for shard in now.evaluate if shard]
    made = {"rows": drawn(run.config(), iteration, total)}
    return {**made, SAMPLE: now.sample, EVALUATE: shards}


def sharding(run: RunFolder, iteration: int, theirs: Mapping[str, Any] | None = None) -> Sharding:
    """How an iteration that begins now is cut; one that has begun keeps what fits still.

    So does one that begins as another run has cut it: `theirs`, a draw as it is written down.

    Validation posts are evaluated with each iteration; all sets at 0 and at the end, and at 0 the
    references and the policies that the run did not make. What was the end when it began stays
    evaluated.
    """
    config, begun = run.config(), iteration in run.graph().shardings
    draw = run.draw(iteration) if begun else theirs
    shards = [Shard(*about) for about in draw[EVALUATE]] if draw else []
    sets = config.evaluate.all_sets
    if iteration not in (0, config.iterations):
        before = {VALID, *(shard.set for shard in shards)}
        sets = [name for name in sets if name in before]
    asked: dict[Shard, None] = {}  # a set in order
    others = [*([REFERENCES] if config.evaluate.references else []), *config.evaluate.policies]
    for policy in [OWN, *(others if iteration == 0 else [])]:
        for name in sets:
            asked |= dict.fromkeys(_covering(run, shards, policy, name))
    kept = _kept(shards, asked)
    earlier = _asked_before(run, iteration)
    count = config.sample.prompts if iteration else 0
    sample = cut(count, config.sample.group, config.cluster.stage(SAMPLE).shards)
    sample = tuple((start, end) for start, end in draw[SAMPLE]) if draw else sample
    now = [(OVER.join(pair), config.judged_set) for pair in judged(run, iteration)]
    now += [(COMPARISONS, COMPARISONS)] if not iteration and config.judges_humans else []
    pairs = {shard: None for one in now for shard in _covering(run, earlier, *one, JUDGE)}
    return Sharding(sample, kept, _kept(earlier, pairs))


def _kept(begun: Iterable[Shard], asked: Mapping[Shard, None]) -> tuple[Shard | None, ...]:
    """Shards keep their numbers; one that is asked for no more has None in its place."""
    return tuple(shard if shard in asked else None for shard in dict.fromkeys([*begun, *asked]))


def judged(run: RunFolder, iteration: int) -> list[tuple[str, str]]:
    """The pairs that are compared after an iteration; at what was the end, they stay compared."""
    config, before = run.config(), {(s.policy, s.set) for s in _asked_before(run, iteration)}
    stay = [pair for pair in config.pairs if (OVER.join(pair), config.judged_set) in before]
    return [pair for pair in config.pairs if pair in (*config.judged(iteration), *stay)]


def _asked_before(run: RunFolder, iteration: int) -> list[Shard]:
    """What the judge was asked after an iteration that has begun."""
    begun = iteration in run.graph().shardings
    return [Shard(*about) for about in run.draw(iteration).get(JUDGE, [])] if begun else []


def _covering(
    run: RunFolder, begun: Iterable[Shard], policy: str, name: str, stage: str = EVALUATE
) -> list[Shard]:
    """Shards for the evaluated rows of a set: those begun, as far as they go, and new ones."""
    config, count, judge = run.config(), posts(run, name), run.config().judge
    if stage == JUDGE and judge is not None and name != COMPARISONS:
        count = min(count, judge.posts)
    group = config.evaluate.group if stage == EVALUATE else 1
    mine = {s.start: s for s in begun if (s.policy, s.set) == (policy, name) and s.end <= count}
    chosen, at = [], 0
    while at in mine:
        chosen.append(mine[at])
        at = mine[at].end
    rest = cut(count - at, group, config.cluster.stage(stage).shards)
    return chosen + [Shard(policy, name, at + start, at + end) for start, end in rest]


def posts(run: RunFolder, name: str) -> int:
    """How many rows of a set are evaluated."""
    config = run.config()
    asked = {VALID: config.evaluate.prompts, TEST: config.evaluate.test_prompts}.get(name)
    if name == COMPARISONS and config.judge:
        asked = config.judge.comparisons
    place = texts.of_set(config, name)
    if rows.is_frozen(run, place):
        found = rows.count(run, place)
        return min(found, asked or found)
    if asked:  # only a plan is asked for, before anything has been frozen
        return asked
    (one,) = [one for one in texts.wanted(config) if one.name == place]
    return sum(1 for _ in texts.chosen(one, config.domain))


def frozen(run: RunFolder, piece: Piece) -> list[dict[str, Any]]:
    """Data rows of a shard: of an iteration's draw, or of the set that it evaluates."""
    start, end = run.graph().rows(piece) or (0, 0)
    if shard := run.graph().shard(piece):
        name, asked = texts.of_set(run.config(), shard.set), range(start, end)
    else:
        name, asked = texts.PROMPTS, run.draw(piece.iteration)["rows"][start:end]
    return rows.frozen(run, name, asked)


def prompts(run: RunFolder, piece: Piece) -> list[str]:
    """Raw prompts of a shard."""
    return [row["prompt"] for row in frozen(run, piece)]

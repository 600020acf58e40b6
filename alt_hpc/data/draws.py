"""Draws of prompts: which rows an iteration samples from and is evaluated on, and its shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alt_hpc.config import Config
from alt_hpc.data import frozen, texts
from alt_hpc.graph import EVALUATE, OWN, SAMPLE, TEST, VALID, Piece, Shard, Sharding, cut
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder


def begin(run: RunFolder, iteration: int) -> None:
    """Draw an iteration's prompts and cut it into shards, if that has not been done.

    The draw is a function of (run seed, iteration): N rows of the train split, with replacement
    (duplicates are separate rows) or without. Iteration 0 only evaluates. What is evaluated later
    than the iteration began (a set, a policy) is added to it.
    """
    planned = sharding(run, iteration)
    if run.graph().shardings.get(iteration) == planned:
        return
    config = run.config()
    total = rows.count(run, "prompts-train")
    rng = np.random.default_rng([config.seed, iteration])
    count = config.sample.prompts if iteration else 0
    drawn = rng.choice(total, size=count, replace=config.sample.replacement)
    run.begin(iteration, {"rows": drawn.tolist()}, planned)


def sharding(run: RunFolder, iteration: int) -> Sharding:
    """How an iteration that begins now is cut; one that has begun keeps what fits still."""
    config = run.config()
    begun = run.graph().shardings.get(iteration)
    shards = [Shard(*about) for about in run.draw(iteration)[EVALUATE]] if begun else []
    asked = set()
    for policy, name in evaluated(config, iteration, shards):
        for shard in _covering(shards, policy, name, posts(run, name), config):
            if shard not in shards:
                shards.append(shard)
            asked.add(shard)
    count = config.sample.prompts if iteration else 0
    sample = cut(count, config.sample.group, config.cluster.stage(SAMPLE).shards)
    kept = tuple(shard if shard in asked else None for shard in shards)
    return Sharding(begun.sample if begun else sample, kept)


def evaluated(config: Config, iteration: int, begun: Sequence[Shard]) -> list[tuple[str, str]]:
    """Policies and sets that are evaluated with an iteration.

    Validation posts with each; all sets, and the policies that the run did not make, at 0 and at
    the end. What was the end when an iteration began stays evaluated.
    """
    further = [*([TEST] if config.evaluate.test_prompts else []), *config.evaluate.sets]
    policies = [OWN, *(config.evaluate.policies if iteration == 0 else [])]
    ends = iteration in (0, config.iterations)
    before = {shard.set for shard in begun}
    sets = [VALID, *(name for name in further if ends or name in before)]
    return [(policy, name) for policy in policies for name in sets]


def posts(run: RunFolder, name: str) -> int:
    """How many rows of a set are evaluated."""
    config = run.config()
    asked = {VALID: config.evaluate.prompts, TEST: config.evaluate.test_prompts}.get(name)
    place = frozen.of_set(config, name)
    if rows.is_frozen(run, place):
        found = rows.count(run, place)
        return min(found, asked or found)
    if asked:  # only a plan is asked for, before anything has been frozen
        return asked
    (one,) = [one for one in frozen.wanted(config) if one.name == place]
    found = sum(1 for _ in texts.read(one.source, one.split, one.columns, one.field))
    return min(found, one.limit or found)


def _covering(
    begun: Sequence[Shard], policy: str, name: str, count: int, config: Config
) -> list[Shard]:
    """Shards for the first `count` rows of a set: those begun, as far as they go, and new ones."""
    chosen: list[Shard] = []
    at = 0
    mine = {s.start: s for s in begun if (s.policy, s.set) == (policy, name) and s.end <= count}
    while at in mine:
        chosen.append(mine[at])
        at = mine[at].end
    asked = config.cluster.stage(EVALUATE).shards
    rest = cut(count - at, config.evaluate.group, asked)
    return chosen + [Shard(policy, name, at + start, at + end) for start, end in rest]


def drawn_prompts(run: RunFolder, piece: Piece) -> list[str]:
    """Raw prompts of a shard of an iteration's draw."""
    start, end = run.graph().rows(piece) or (0, 0)
    drawn = run.draw(piece.iteration)["rows"][start:end]
    return [row["prompt"] for row in rows.frozen(run, "prompts-train", drawn)]


def held_out_prompts(run: RunFolder, shard: Shard) -> list[str]:
    """Raw prompts of a shard of evaluation."""
    name = frozen.of_set(run.config(), shard.set)
    return [row["prompt"] for row in rows.frozen(run, name, range(shard.start, shard.end))]

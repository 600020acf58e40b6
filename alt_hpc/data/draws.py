"""Draws of prompts: which rows an iteration samples from and is evaluated on, and its shards."""

from collections.abc import Iterable
from itertools import islice

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
    seed, sample = run.config().seed, run.config().sample
    rng, total = np.random.default_rng([seed, iteration]), rows.count(run, "prompts-train")
    drawn = rng.choice(total, sample.prompts if iteration else 0, sample.replacement)
    run.begin(iteration, {"rows": drawn.tolist()}, planned)


def sharding(run: RunFolder, iteration: int) -> Sharding:
    """How an iteration that begins now is cut; one that has begun keeps what fits still."""
    config, begun = run.config(), run.graph().shardings.get(iteration)
    shards = [Shard(*about) for about in run.draw(iteration)[EVALUATE]] if begun else []
    asked: dict[Shard, None] = {}  # a set in order
    for policy, name in evaluated(config, iteration, shards):
        asked |= dict.fromkeys(_covering(shards, policy, name, posts(run, name), config))
    kept = [shard if shard in asked else None for shard in dict.fromkeys([*shards, *asked])]
    count = config.sample.prompts if iteration else 0
    sample = cut(count, config.sample.group, config.cluster.stage(SAMPLE).shards)
    return Sharding(begun.sample if begun else sample, tuple(kept))


def evaluated(config: Config, iteration: int, begun: Iterable[Shard]) -> list[tuple[str, str]]:
    """Policies and sets that are evaluated with an iteration.

    Validation posts with each; all sets, and the policies that the run did not make, at 0 and at
    the end. What was the end when an iteration began stays evaluated.
    """
    further = [*([TEST] if config.evaluate.test_prompts else []), *config.evaluate.sets]
    if iteration not in (0, config.iterations):
        before = {shard.set for shard in begun}
        further = [name for name in further if name in before]
    policies = [OWN, *(config.evaluate.policies if iteration == 0 else [])]
    return [(policy, name) for policy in policies for name in [VALID, *further]]


def posts(run: RunFolder, name: str) -> int:
    """How many rows of a set are evaluated."""
    config = run.config()
    asked = {VALID: config.evaluate.prompts, TEST: config.evaluate.test_prompts}.get(name)
    place = frozen.of_set(config, name)
    if rows.is_frozen(run, place):
        found = rows.count(run, place)
    elif asked:  # only a plan is asked for, before anything has been frozen
        return asked
    else:
        (one,) = [one for one in frozen.wanted(config) if one.name == place]
        wanted = texts.read(one.source, one.split, one.columns, one.field)
        found = sum(1 for _ in islice(wanted, one.limit))
    return min(found, asked or found)


def _covering(
    begun: Iterable[Shard], policy: str, name: str, count: int, config: Config
) -> list[Shard]:
    """Shards for the first `count` rows of a set: those begun, as far as they go, and new ones."""
    mine = {s.start: s for s in begun if (s.policy, s.set) == (policy, name) and s.end <= count}
    chosen, at = [], 0
    while at in mine:
        chosen.append(mine[at])
        at = mine[at].end
    rest = cut(count - at, config.evaluate.group, config.cluster.stage(EVALUATE).shards)
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

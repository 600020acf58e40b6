"""The pieces of a run and what each is made from: the graph that plan, stages and reports share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from alt_hpc.config import Config, digest

STAGES = ("sft", "reward-model", "sample", "score", "train", "evaluate", "report")


@dataclass(frozen=True, order=True)
class Piece:
    """One unit of work: a stage of an iteration, or one shard of it."""

    iteration: int
    stage: str
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.stage} {self.iteration} shard {self.shard}"


@dataclass(frozen=True)
class Sharding:
    """How an iteration is cut: rows [start, end) of each shard, whole prompt groups each.

    It is written down when the iteration begins, so that it can be changed for later ones.
    """

    sample: tuple[tuple[int, int], ...]
    evaluate: tuple[tuple[int, int], ...]


def cut(rows: int, group: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Cut rows into at most `shards` runs of whole groups, as even as possible, none empty."""
    groups = -(-rows // group)
    if not groups:
        return ()
    shards = min(shards, groups)
    edges = [min(rows, groups * i // shards * group) for i in range(shards + 1)]
    return tuple(itertools.pairwise(edges))


def starting_policy(config: Config) -> Piece | None:
    """The piece that makes the policy of iteration 0; None when the config names a checkpoint."""
    return Piece(0, "sft") if config.policy.model is None else None


def policy(config: Config, iteration: int) -> Piece | None:
    """The piece that makes the policy after `iteration`."""
    return Piece(iteration, "train") if iteration else starting_policy(config)


def reward_model(config: Config) -> Piece | None:
    """The piece that makes the reward model; None when the config names a checkpoint."""
    return Piece(0, "reward-model") if config.reward_model.model is None else None


def inputs(config: Config, shardings: Mapping[int, Sharding], piece: Piece) -> list[Piece]:
    """What a piece is made from, in a fixed order."""
    k, shard = piece.iteration, piece.shard
    found: list[Piece | None]
    match piece.stage:
        case "sft" | "reward-model":
            found = []
        case "sample":
            found = [policy(config, k - 1)]
        case "score":
            found = [Piece(k, "sample", shard), reward_model(config)]
        case "train":
            shards = range(len(shardings[k].sample))
            found = [policy(config, k - 1), starting_policy(config)]
            found += [Piece(k, stage, i) for stage in ("sample", "score") for i in shards]
        case "evaluate":
            found = [policy(config, k), starting_policy(config), reward_model(config)]
        case "report":
            found = [Piece(k, "evaluate", i) for i in range(len(shardings[k].evaluate))]
            if k:
                shards = range(len(shardings[k].sample))
                found += [Piece(k, "train")]
                found += [Piece(k, stage, i) for stage in ("sample", "score") for i in shards]
            found += [reward_model(config) if k == 0 else None]
        case _:
            raise ValueError(f"no such stage: {piece.stage}")
    return list(dict.fromkeys(p for p in found if p is not None))


def fingerprint(config: Config, shardings: Mapping[int, Sharding], piece: Piece) -> str:
    """sha256 (hex) of what decides a piece's content, its inputs' bytes apart."""
    rows: tuple[int, int] | None = None
    if piece.stage in ("sample", "score"):
        rows = shardings[piece.iteration].sample[piece.shard]
    if piece.stage == "evaluate":
        rows = shardings[piece.iteration].evaluate[piece.shard]
    return digest([config.fingerprint(), piece.stage, piece.iteration, rows])

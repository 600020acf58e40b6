"""The graph of a run: its pieces, the one table of stages, and what each piece is made from.

Planning, progress, config keys, the command line and the tests' stubs derive from `STAGES`: a new
stage is one row here and one file in `stages/`. The table stands below `config`, which takes its
`cluster.STAGE` keys from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from alt_hpc.config import Config

SFT = "sft"
REWARD_MODEL = "reward-model"
SAMPLE = "sample"
SCORE = "score"
TRAIN = "train"
EVALUATE = "evaluate"
REPORT = "report"


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

    `sample` cuts the drawn prompts, `evaluate` the held-out ones. It is written down when the
    iteration begins, so that it can be changed for later ones.
    """

    sample: tuple[tuple[int, int], ...]
    evaluate: tuple[tuple[int, int], ...]


Cut = Literal["sample", "evaluate"]
Made = Callable[["Config", int], bool]
Sources = Callable[["Graph", Piece], Iterable[Piece]]


@dataclass(frozen=True)
class Graph:
    """The pieces of a run whose iterations are cut like this, and what each is made from."""

    config: Config
    shardings: Mapping[int, Sharding]  # of the iterations that have begun

    def of(self, iteration: int, stage: str) -> tuple[Piece, ...]:
        """The pieces of a stage of an iteration, in the order of its rows; none where not made."""
        row = STAGES[stage]
        if not row.made(self.config, iteration) or (row.cut and iteration not in self.shardings):
            return ()
        shards = len(getattr(self.shardings[iteration], row.cut)) if row.cut else 1
        return tuple(Piece(iteration, stage, shard) for shard in range(shards))

    def stages(self, iteration: int) -> list[str]:
        """The stages that are made in an iteration."""
        return [name for name, row in STAGES.items() if row.made(self.config, iteration)]

    def pieces(self, iteration: int | None = None) -> Iterator[Piece]:
        """All pieces of one iteration, or of all that have begun."""
        for k in self.shardings if iteration is None else (iteration,):
            for stage in STAGES:
                yield from self.of(k, stage)

    def sources(self, piece: Piece) -> list[Piece]:
        """What a piece is made from, in a fixed order."""
        row = STAGES[piece.stage]
        mate = [Piece(piece.iteration, row.pairs, piece.shard)] if row.pairs else []
        found = [source for sources in row.sources for source in sources(self, piece)]
        return list(dict.fromkeys([*mate, *found]))

    def results(self, iteration: int) -> list[Piece]:
        """The pieces of an iteration that no other of it is made from, and the policy."""
        everyone = list(self.pieces(iteration))
        used = {source for piece in everyone for source in self.sources(piece)}
        return [p for p in everyone if p not in used or p.stage == TRAIN]

    def policy(self, iteration: int) -> Piece | None:
        """What makes the policy after an iteration; None at 0 where the config names it."""
        return next(iter(self.of(iteration, TRAIN if iteration else SFT)), None)

    def reward_model(self) -> Piece | None:
        """What makes the reward model; None where the config names it."""
        return next(iter(self.of(0, REWARD_MODEL)), None)

    def rows(self, piece: Piece) -> tuple[int, int] | None:
        """Rows [start, end) that a shard is made for; None where the stage is not cut."""
        cut = STAGES[piece.stage].cut
        if cut is None:
            return None
        found: tuple[int, int] = getattr(self.shardings[piece.iteration], cut)[piece.shard]
        return found

    def needed_by_training(self) -> set[str]:
        """The stages that training is made from, directly or not, itself among them."""
        one = Sharding(((0, 1),), ((0, 1),))
        small = Graph(self.config, {0: one, 1: one, 2: one})
        found: dict[Piece, None] = {}
        todo = list(small.of(2, TRAIN))
        while todo:
            piece = todo.pop()
            if piece not in found:
                found[piece] = None
                todo += small.sources(piece)
        return {piece.stage for piece in found}


# ---------------------------------------------------------------------- in which iterations


def each(config: Config, iteration: int) -> bool:
    """Iterations 1 to K."""
    return iteration > 0


def always(config: Config, iteration: int) -> bool:
    """Iteration 0, the starting policy, too."""
    return True


def without_policy(config: Config, iteration: int) -> bool:
    """Once, unless the config names the policy that a run starts from."""
    return iteration == 0 and config.policy.model is None


def without_reward_model(config: Config, iteration: int) -> bool:
    """Once, unless the config names a reward model."""
    return iteration == 0 and config.reward_model.model is None


# ---------------------------------------------------------------------- from what


def every(stage: str) -> Sources:
    """All pieces of a stage of the same iteration."""
    return lambda graph, piece: graph.of(piece.iteration, stage)


def once(stage: str) -> Sources:
    """All pieces of a stage that is made before iteration 1."""
    return lambda graph, piece: graph.of(0, stage)


def policy(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy after the piece's iteration."""
    return filter(None, [graph.policy(piece.iteration)])


def policy_before(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy that the piece's iteration starts from."""
    return filter(None, [graph.policy(piece.iteration - 1)])


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Stage:
    """One row: what planning, progress, config and command line need to know of a stage."""

    name: str
    sources: tuple[Sources, ...] = ()
    made: Made = each
    cut: Cut | None = None  # cut into shards like this stage; None: one piece
    pairs: str | None = None  # with this stage, shard by shard: made from the same shard of it
    training: str | None = None  # the config's section of its optimisation, on many ranks
    rows: str = "rows"  # what the rows that it writes are called

    @property
    def key(self) -> str:
        """Its name as a Python word: the config's key and the module in `stages/`."""
        return self.name.replace("-", "_")


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(SFT, made=without_policy, training="sft"),
        Stage(REWARD_MODEL, made=without_reward_model, training="reward_training"),
        Stage(SAMPLE, (policy_before,), cut="sample", rows="samples"),
        Stage(SCORE, (once(REWARD_MODEL),), cut="sample", pairs=SAMPLE, rows="scores"),
        Stage(
            TRAIN,
            (policy_before, once(SFT), every(SAMPLE), every(SCORE)),
            training="training",
        ),
        Stage(
            EVALUATE,
            (policy, once(SFT), once(REWARD_MODEL)),
            made=always,
            cut="evaluate",
            rows="evaluations",
        ),
        Stage(
            REPORT,
            (every(EVALUATE), every(TRAIN), every(SAMPLE), every(SCORE), every(REWARD_MODEL)),
            made=always,
        ),
    )
}


def cut(rows: int, group: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Cut rows into at most `shards` runs of whole groups, as even as possible, none empty."""
    groups = -(-rows // group)
    if not groups:
        return ()
    shards = min(shards, groups)
    edges = [min(rows, groups * i // shards * group) for i in range(shards + 1)]
    return tuple(itertools.pairwise(edges))

"""The graph of a run: its pieces, the one table of stages, and what each piece is made from.

Planning, fingerprints, progress, config keys, the command line and the tests' stubs derive from
`STAGES`: a new stage is one row here and one file in `stages/`. The table stands below `config`,
which takes its `cluster.STAGE` keys from it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from alt_hpc.config import Config

SFT = "sft"
REWARD_MODEL = "reward-model"
SAMPLE: Literal["sample"] = "sample"
SCORE = "score"
TRAIN = "train"
EVALUATE: Literal["evaluate"] = "evaluate"
MEASURE = "measure"
REPORT = "report"


@dataclass(frozen=True, order=True)
class Piece:
    """One unit of work: a stage of an iteration, or one shard of it."""

    iteration: int
    stage: str
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.stage} {self.iteration} shard {self.shard}"


OWN = "own"  # the policies that a run makes, beside those that it only evaluates
VALID, TEST = "valid", "test"  # the sets of `data.prompts`, beside those of `evaluate.sets`


@dataclass(frozen=True)
class Shard:
    """Where a piece of evaluation stands: rows [start, end) of a set, answered by a policy."""

    policy: str  # OWN, or a name of `evaluate.policies`
    set: str
    start: int
    end: int


@dataclass(frozen=True)
class Sharding:
    """How an iteration is cut: rows [start, end) of each shard, whole prompt groups each.

    `sample` cuts the drawn prompts. It is written down when the iteration begins, so that it can
    be changed for later ones. `evaluate` cuts the sets, by shard number; None where the config
    asks for a shard no more. It may grow when a run is submitted again.
    """

    sample: tuple[tuple[int, int], ...]
    evaluate: tuple[Shard | None, ...]


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
        shards = getattr(self.shardings[iteration], row.cut) if row.cut else ((0, 1),)
        return tuple(Piece(iteration, stage, i) for i, shard in enumerate(shards) if shard)

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
        """Rows [start, end) of a shard (LookupError: asked for no more); None where not cut."""
        if STAGES[piece.stage].cut != EVALUATE:
            cut = STAGES[piece.stage].cut
            return self.shardings[piece.iteration].sample[piece.shard] if cut else None
        if shard := self.shard(piece):
            return shard.start, shard.end
        raise LookupError(f"{piece} is no longer asked for")

    def shard(self, piece: Piece) -> Shard | None:
        """What a piece of evaluation is made for; None where the config asks for it no more."""
        if STAGES[piece.stage].cut != EVALUATE:
            return None
        return self.shardings[piece.iteration].evaluate[piece.shard]

    def decides(self, piece: Piece) -> list[Any]:
        """What decides a piece's content, its sources apart, as JSON values."""
        sections = {
            name: reduce(operator.getitem, name.split("."), self._values)
            for name in f"{_ALL} {STAGES[piece.stage].sections}".split()
        }
        about: list[Any] = [sections, piece.stage, piece.iteration, self.rows(piece)]
        if shard := self.shard(piece):
            evaluate = self.config.evaluate
            named = evaluate.policies.get(shard.policy), evaluate.sets.get(shard.set)
            about += [shard.policy, shard.set]
            about += [settings.model_dump(mode="json") for settings in named if settings]
        return about

    @cached_property
    def _values(self) -> Any:
        return self.config.values()

    def needed_by_training(self) -> set[str]:
        """The stages that training is made from, directly or not, itself among them."""
        one = Sharding(((0, 1),), (Shard(OWN, VALID, 0, 1),))
        small = Graph(self.config, dict.fromkeys(range(3), one))
        found = list(small.of(2, TRAIN))
        for piece in found:
            found += [source for source in small.sources(piece) if source not in found]
        return {piece.stage for piece in found}


# In which iterations a stage is made.


def each(config: Config, iteration: int) -> bool:
    return iteration > 0


def always(config: Config, iteration: int) -> bool:
    return True


def own_policy(config: Config, iteration: int) -> bool:
    return iteration == 0 and config.policy.model is None


def own_reward(config: Config, iteration: int) -> bool:
    return iteration == 0 and config.reward.trained


# What a piece is made from, as far as the run makes it.


def every(stage: str) -> Sources:
    """All pieces of a stage of the same iteration."""
    return lambda graph, piece: graph.of(piece.iteration, stage)


def once(stage: str) -> Sources:
    """All pieces of a stage that is made before iteration 1."""
    return lambda graph, piece: graph.of(0, stage)


def start(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy that the piece's iteration starts from."""
    return graph.of(piece.iteration - 1, TRAIN if piece.iteration > 1 else SFT)


def asked(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy that answers: the run's own after the piece's iteration, or one it only names."""
    shard = graph.shard(piece)
    own = shard is not None and shard.policy == OWN
    return graph.of(piece.iteration, TRAIN if piece.iteration else SFT) if own else ()


def earlier(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """What the method reads of the iteration before, to ask with."""
    k = piece.iteration
    return [p for stage in graph.config.method.sources(k) for p in graph.of(k - 1, stage)]


def meter(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The reward model that evaluations are measured with."""
    return graph.of(0, REWARD_MODEL) if graph.config.measured_by.trained else ()


@dataclass(frozen=True)
class Stage:
    """One row: what planning, progress, config and command line need to know of a stage."""

    name: str
    sources: tuple[Sources, ...] = ()
    sections: str = ""  # of the config, or keys of them, that decide its content, beside _ALL
    made: Made = each
    cut: Cut | None = None  # cut into shards like this stage, which it pairs with; None: one piece
    training: bool = False  # an optimisation on many ranks; the config's section bears its name
    rows: str = "rows"  # what the rows that it writes are called

    @property
    def key(self) -> str:
        """Its name as a Python word: the config's key and the module in `stages/`."""
        return self.name.replace("-", "_")

    @property
    def pairs(self) -> str | None:
        """The other stage, each shard of which one shard of this stage is made from."""
        return self.cut if self.cut != self.name else None


_ALL = "seed threads domain"
_ROOM = "sample.max_new_tokens"  # that every reward keeps free for an answer
_HELD = f"evaluate.max_new_tokens evaluate.group {_ROOM}"

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(SFT, (), "policy data sft", own_policy, training=True),
        Stage(REWARD_MODEL, (), f"data reward reward_model {_ROOM}", own_reward, training=True),
        Stage(
            SAMPLE, (start, earlier), "policy data method engine sample", cut=SAMPLE, rows="samples"
        ),
        Stage(SCORE, (once(REWARD_MODEL),), f"method reward {_ROOM}", cut=SAMPLE, rows="scores"),
        Stage(
            TRAIN,
            (start, once(SFT), every(SAMPLE), every(SCORE)),
            "policy method sample train",
            training=True,
        ),
        Stage(
            EVALUATE, (asked,), f"{_HELD} policy method engine", always, EVALUATE, rows="answers"
        ),
        Stage(
            MEASURE,
            (once(SFT), meter),
            f"{_HELD} policy reward measure",
            always,
            EVALUATE,
            rows="measures",
        ),
        Stage(
            REPORT,
            tuple(map(every, (MEASURE, EVALUATE, TRAIN, SAMPLE, SCORE, REWARD_MODEL))),
            "method",
            always,
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

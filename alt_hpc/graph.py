"""The graph of a run: its pieces, the one table of stages, and what each piece is made from.

Planning, fingerprints, progress, config keys, the command line and the tests' stubs derive from
`STAGES`: a new stage is one row here and one file in `stages/`. The table stands below `config`,
which takes its `cluster.STAGE` keys from it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from alt_hpc.config import Config
    from alt_hpc.settings import Settings

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
        """Rows [start, end) that a shard is made for; None where the stage is not cut."""
        cut = STAGES[piece.stage].cut
        if cut == SAMPLE:
            return self.shardings[piece.iteration].sample[piece.shard]
        if cut is None:
            return None
        shard = self.shard(piece)
        if shard is None:
            raise LookupError(f"{piece} is no longer asked for")
        return shard.start, shard.end

    def shard(self, piece: Piece) -> Shard | None:
        """What a piece of evaluation is made for; None where the config asks for it no more."""
        if STAGES[piece.stage].cut != EVALUATE:
            return None
        return self.shardings[piece.iteration].evaluate[piece.shard]

    def decides(self, piece: Piece) -> list[Any]:
        """What decides a piece's content, its sources apart, as JSON values."""
        about: list[Any] = [self._settings[piece.stage], piece.stage, piece.iteration]
        about.append(self.rows(piece))
        if shard := self.shard(piece):
            about += [shard.policy, shard.set]
            about += _values(self.config.evaluate.policies.get(shard.policy))
            about += _values(self.config.evaluate.sets.get(shard.set))
        return about

    @cached_property
    def _settings(self) -> dict[str, dict[str, Any]]:
        """The settings that decide the content of each stage's pieces, by name."""
        values = self.config.values()
        return {
            stage: {name: _at(values, name) for name in row.sections}
            for stage, row in STAGES.items()
        }

    def needed_by_training(self) -> set[str]:
        """The stages that training is made from, directly or not, itself among them."""
        one = Sharding(((0, 1),), (Shard(OWN, VALID, 0, 1),))
        small = Graph(self.config, {0: one, 1: one, 2: one})
        found: dict[Piece, None] = {}
        todo = list(small.of(2, TRAIN))
        while todo:
            piece = todo.pop()
            if piece not in found:
                found[piece] = None
                todo += small.sources(piece)
        return {piece.stage for piece in found}


def _at(values: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name."""
    return functools.reduce(lambda value, key: value[key], name.split("."), values)


def _values(settings: Settings | None) -> list[Any]:
    return [settings.model_dump(mode="json")] if settings else []


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
    return iteration == 0 and config.reward.trained


# ---------------------------------------------------------------------- from what


def every(stage: str) -> Sources:
    """All pieces of a stage of the same iteration."""
    return lambda graph, piece: graph.of(piece.iteration, stage)


def once(stage: str) -> Sources:
    """All pieces of a stage that is made before iteration 1."""
    return lambda graph, piece: graph.of(0, stage)


def asked(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy that answers: the one after the piece's iteration, where the run makes it."""
    shard = graph.shard(piece)
    own = shard is not None and shard.policy == OWN
    return filter(None, [graph.policy(piece.iteration)] if own else [])


def earlier(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """What the method reads of the iteration before, to ask with."""
    k = piece.iteration - 1
    return [p for stage in graph.config.method.sources(k + 1) for p in graph.of(k, stage)]


def scorer(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The reward model that scores samples, where the run makes it."""
    return graph.of(0, REWARD_MODEL) if graph.config.reward.trained else ()


def meter(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The reward model that evaluations are measured with, where the run makes it."""
    return graph.of(0, REWARD_MODEL) if graph.config.measured_by.trained else ()


def policy_before(graph: Graph, piece: Piece) -> Iterable[Piece]:
    """The policy that the piece's iteration starts from."""
    return filter(None, [graph.policy(piece.iteration - 1)])


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Stage:
    """One row: what planning, progress, config and command line need to know of a stage."""

    name: str
    sources: tuple[Sources, ...] = ()
    sections: tuple[str, ...] = ()  # of the config, or keys of them, that decide its content
    made: Made = each
    cut: Cut | None = None  # cut into shards like this stage; None: one piece
    pairs: str | None = None  # with this stage, shard by shard: made from the same shard of it
    training: bool = False  # an optimisation on many ranks; the config's section bears its name
    rows: str = "rows"  # what the rows that it writes are called

    @property
    def key(self) -> str:
        """Its name as a Python word: the config's key and the module in `stages/`."""
        return self.name.replace("-", "_")


_ALL = ("seed", "threads", "domain")
_ROOM = "sample.max_new_tokens"  # that every reward keeps free for an answer
_HELD_OUT = ("evaluate.max_new_tokens", "evaluate.group", _ROOM)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            SFT,
            sections=(*_ALL, "policy", "data", "sft"),
            made=without_policy,
            training=True,
        ),
        Stage(
            REWARD_MODEL,
            sections=(*_ALL, "data", "reward", "reward_model", _ROOM),
            made=without_reward_model,
            training=True,
        ),
        Stage(
            SAMPLE,
            (policy_before, earlier),
            (*_ALL, "policy", "data", "method", "engine", "sample"),
            cut=SAMPLE,
            rows="samples",
        ),
        Stage(
            SCORE,
            (scorer,),
            (*_ALL, "method", "reward", _ROOM),
            cut=SAMPLE,
            pairs=SAMPLE,
            rows="scores",
        ),
        Stage(
            TRAIN,
            (policy_before, once(SFT), every(SAMPLE), every(SCORE)),
            (*_ALL, "policy", "method", "sample", "train"),
            training=True,
        ),
        Stage(
            EVALUATE,
            (asked,),
            (*_ALL, *_HELD_OUT, "policy", "method", "engine"),
            made=always,
            cut=EVALUATE,
            rows="answers",
        ),
        Stage(
            MEASURE,
            (once(SFT), meter),
            (*_ALL, *_HELD_OUT, "policy", "reward", "measure"),
            made=always,
            cut=EVALUATE,
            pairs=EVALUATE,
            rows="measures",
        ),
        Stage(
            REPORT,
            tuple(map(every, (MEASURE, EVALUATE, TRAIN, SAMPLE, SCORE, REWARD_MODEL))),
            (*_ALL, "method"),
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

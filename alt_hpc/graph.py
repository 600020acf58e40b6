"""The graph of a run: its pieces, the one table of stages, and what each piece is made from.

Planning, fingerprints, progress, config keys and the command line derive from `STAGES`: a new stage
is one row here and one file in `stages/`. `config` takes its `cluster.STAGE` keys from the table.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
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
JUDGE: Literal["judge"] = "judge"
WIN_RATES = "win-rates"
REPORT = "report"
METHOD = "method"  # the section of the config


@dataclass(frozen=True, order=True)
class Piece:
    """One unit of work: a stage of an iteration, or one shard of it."""

    iteration: int
    stage: str
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.stage} {self.iteration} shard {self.shard}"


OWN = "own"  # the policies that a run makes, beside those that it only evaluates
REFERENCES = "references"  # the labels of the data, as if a policy had written them
START = "start"  # the policy before iteration 1, as `evaluate.policies` names it
BEST = "best"  # the run's policy, asked for the best, as tables and `judge.pairs` name it
ASKED = "asked"  # the one variant of policies that the run did not make
OVER = " over "  # stands between the two rows of a pair that is judged
COMPARISONS = "comparisons"  # of people, which the judge is asked too
VALID, TEST = "valid", "test"  # the sets of `data.prompts`, beside those of `evaluate.sets`
DRAWN = "drawn "  # begins the variant of answers that were sampled, not greedy


@dataclass(frozen=True)
class Shard:
    """Where a piece of evaluation stands: rows [start, end) of a set, answered by a policy.

    Where it is judged, `policy` is a pair, such as `best over start`, or COMPARISONS like its set.
    """

    policy: str  # OWN, REFERENCES, or a name of `evaluate.policies`
    set: str
    start: int
    end: int


@dataclass(frozen=True)
class Sharding:
    """How an iteration is cut: rows [start, end) of each shard, whole prompt groups each.

    Written down when the iteration begins, so that `cluster` may ask otherwise for later ones.
    """

    sample: tuple[tuple[int, int], ...]  # of the drawn prompts
    evaluate: tuple[Shard | None, ...]  # None: asked for no more; may grow on resubmission
    judge: tuple[Shard | None, ...] = ()  # the same


@dataclass(frozen=True)
class Graph:
    """The pieces of a run whose iterations are cut like this, and what each is made from."""

    config: "Config"
    shardings: Mapping[int, Sharding]  # of the iterations that have begun

    def of(self, iteration: int, *stages: str) -> list[Piece]:
        """The pieces of stages of an iteration, in the order of their rows; none where not made."""
        begun, found = self.shardings.get(iteration), list[Piece]()
        for stage in stages:
            row = STAGES[stage]
            if row.made(self, iteration) and (begun or not row.cut):
                shards = getattr(begun, row.cut) if row.cut else ((0, 1),)
                found += [Piece(iteration, stage, i) for i, shard in enumerate(shards) if shard]
        return found

    def pool(self, iteration: int, *stages: str) -> list[Piece]:
        """The pieces of stages of all iterations whose draws are trained on in one."""
        ks = self.config.method.pooled(iteration)
        return [piece for k in ks for piece in self.of(k, *stages)]

    def stages(self, iteration: int) -> list[str]:
        """The stages that are made in an iteration."""
        return [name for name, row in STAGES.items() if row.made(self, iteration)]

    def pieces(self, iteration: int | None = None) -> list[Piece]:
        """All pieces of one iteration, or of all that have begun."""
        ks = self.shardings if iteration is None else (iteration,)
        return [piece for k in ks for piece in self.of(k, *STAGES)]

    def sources(self, piece: Piece) -> list[Piece]:
        """What a piece is made from, as far as the run makes it, in a fixed order."""
        row = STAGES[piece.stage]
        mate = [Piece(piece.iteration, row.pairs, piece.shard)] if row.pairs else []
        found = row.sources(self, piece.iteration, self.shard(piece))
        return list(dict.fromkeys([*mate, *filter(None, found)]))

    def policy(self, iteration: int) -> Piece | None:
        """What makes the policy after an iteration; None at 0 where the config names it."""
        return next(iter(self.of(iteration, TRAIN if iteration else SFT)), None)

    def reward_model(self) -> Piece | None:
        """What makes the reward model; None where the config names it."""
        return next(iter(self.of(0, REWARD_MODEL)), None)

    def rows(self, piece: Piece) -> tuple[int, int] | None:
        """Rows [start, end) of a shard (LookupError: asked for no more); None where not cut."""
        cut = STAGES[piece.stage].cut
        if cut not in OF_SETS:
            return self.shardings[piece.iteration].sample[piece.shard] if cut else None
        if shard := self.shard(piece):
            return shard.start, shard.end
        raise LookupError(f"{piece} is no longer asked for")

    def shard(self, piece: Piece) -> Shard | None:
        """What a piece of evaluation is made for; None where the config asks for it no more."""
        if (cut := STAGES[piece.stage].cut) not in OF_SETS:
            return None
        found: tuple[Shard | None, ...] = getattr(self.shardings[piece.iteration], cut)
        return found[piece.shard]

    def fixed(self, shard: Shard | None = None) -> list[Piece]:
        """What holds the starting policy's drawn answers to valid posts, or to those of a shard."""
        most = self.config.evaluate.drawn.posts
        asked = shard or Shard(OWN, VALID, 0, most)

        def holds(s: Shard | None) -> bool:
            if s is None or not (s.policy, s.set) == (OWN, VALID) == (asked.policy, asked.set):
                return False
            return max(s.start, asked.start) < min(s.end, asked.end, most)

        return [piece for piece in self.of(0, EVALUATE) if holds(self.shard(piece))]

    def compared(self, iteration: int, shard: Shard | None) -> list[Piece]:
        """What holds the answers that a shard of pairs compares; nothing for those of people."""
        if shard is None or shard.policy == COMPARISONS:
            return []
        found = list[Piece]()
        for name in shard.policy.split(OVER):
            k, policy = iteration if name == BEST else 0, OWN if name in (BEST, START) else name
            for piece in self.of(k, EVALUATE):
                its = self.shard(piece)
                if its and (its.policy, its.set) == (policy, shard.set):
                    found += [piece] * (max(its.start, shard.start) < min(its.end, shard.end))
        return found

    def is_judged(self, iteration: int) -> bool:
        """Whether a judge is asked after an iteration, as it began or as it would begin now."""
        if begun := self.shardings.get(iteration):
            return any(begun.judge)
        config = self.config
        return bool(config.judged(iteration)) or (not iteration and config.judges_humans)

    def humans(self) -> list[Piece]:
        """What judges the comparisons of people."""
        pieces = [(piece, self.shard(piece)) for piece in self.of(0, JUDGE)]
        return [piece for piece, shard in pieces if shard and shard.policy == COMPARISONS]

    def judges(self, shard: Shard | None) -> Piece | None:
        """The reward model that judges the comparisons of people beside the judge."""
        its = shard and shard.policy == COMPARISONS and self.config.measured_by.trained
        return self.reward_model() if its else None

    def best_of(self, shard: Shard | None) -> str | None:
        """The policy whose answers a shard is the best of; None where it is of no such row."""
        found = self.config.evaluate.policies.get(shard.policy) if shard else None
        return getattr(found, "of", None)

    def answered_with(self, iteration: int, shard: Shard | None) -> list[Piece | None]:
        """What the answers of a shard are made with, as far as the run makes it."""
        if shard and shard.policy == OWN:
            sources = self.config.method.sources(iteration)
            return [self.policy(iteration), *self.of(iteration, *sources)]
        of = self.best_of(shard)
        chosen = [self.reward_model()] if of else []  # by the reward
        return [*([self.policy(0)] if of == START else []), *chosen]

    def decides(self, piece: Piece) -> list[Any]:
        """What decides a piece's content, its sources apart, as JSON values."""
        names = f"{_ALL} {STAGES[piece.stage].sections}".split()
        sections = {name: attrgetter(name)(self.config) for name in names}
        if piece.iteration == STAGES[piece.stage].start:
            sections[METHOD] = self.config.method.start(piece.iteration)
        about: list[Any] = [sections, piece.stage, piece.iteration, self.rows(piece)]
        if shard := self.shard(piece):
            evaluate = self.config.evaluate
            named = evaluate.policies.get(shard.policy), evaluate.sets.get(shard.set)
            about += [shard.policy, shard.set, *filter(None, named)]
            if of := self.best_of(shard):
                about += [evaluate.policies.get(of), self.config.reward]
            about += [evaluate.every_word] if shard.policy == OWN else []
            about += [evaluate.drawn] if (shard.policy, shard.set) == (OWN, VALID) else []
        return list(self.config.plain(about))

    def needed_by_training(self) -> set[str]:
        """The stages that training is made from, directly or not, itself among them."""
        one = Sharding(((0, 1),), (Shard(OWN, VALID, 0, 1),))
        small = Graph(self.config, dict.fromkeys(range(3), one))
        found = small.of(2, TRAIN)
        for piece in found:
            found += [source for source in small.sources(piece) if source not in found]
        return {piece.stage for piece in found}


@dataclass(frozen=True)
class Stage:
    """One row: what planning, progress, config and command line need to know of a stage."""

    name: str
    sections: str = ""  # of the config, or keys of them, that decide its content, beside _ALL
    # What is a piece of this iteration (of this shard of evaluation) made from, beside its pair?
    sources: Callable[[Graph, int, Shard | None], Iterable[Piece | None]] = lambda g, k, shard: ()
    made: Callable[[Graph, int], bool] = lambda g, k: k > 0  # in this iteration?
    # Like this stage, which it pairs with.
    cut: Literal["sample", "evaluate", "judge"] | None = None
    start: int | None = None  # an iteration of which the method decides only `Method.start`
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


_ALL = "seed threads"
_ROOM = "sample.max_new_tokens"  # that every reward keeps free for an answer
_HELD = f"domain evaluate.max_new_tokens evaluate.group method {_ROOM}"
_STAGES = (  # g: the graph, k: the iteration
    Stage(
        SFT,
        "domain.bare policy data sft",
        made=lambda g, k: not k and g.config.policy.model is None,
        training=True,
    ),
    Stage(
        REWARD_MODEL,
        f"domain.bare data reward reward_model {_ROOM}",
        made=lambda g, k: not k and g.config.reward.trained,
        training=True,
    ),
    Stage(
        SAMPLE,
        "domain policy data method engine sample",
        lambda g, k, _: [g.policy(k - 1), *g.of(k - 1, *g.config.method.sources(k - 1))],
        cut=SAMPLE,
        start=1,
        rows="samples",
    ),
    Stage(
        SCORE,
        f"domain.bare method reward {_ROOM}",
        lambda g, *_: [g.reward_model()],
        cut=SAMPLE,
        rows="scores",
    ),
    Stage(
        TRAIN,
        "domain policy method sample train",
        lambda g, k, _: [g.policy(k - 1), g.policy(0), *g.pool(k, SAMPLE, SCORE)],
        training=True,
    ),
    Stage(
        EVALUATE,
        f"{_HELD} policy engine sample.temperature sample.top_p",
        lambda g, k, shard: g.answered_with(k, shard),
        lambda g, k: True,
        EVALUATE,
        start=0,
        rows="answers",
    ),
    Stage(
        MEASURE,
        f"{_HELD} policy reward measure",
        lambda g, _, shard: [
            g.policy(0),
            g.reward_model() if g.config.measured_by.trained else None,
            *(g.fixed(shard) if shard else ()),
        ],
        lambda g, k: True,
        EVALUATE,
        start=0,
        rows="measures",
    ),
    Stage(
        JUDGE,
        "domain.bare judge",
        lambda g, k, shard: [*g.compared(k, shard), g.judges(shard)],
        Graph.is_judged,
        JUDGE,
        rows="verdicts",
    ),
    Stage(
        WIN_RATES,
        sources=lambda g, k, _: [*g.humans(), *g.of(k, JUDGE)],
        made=Graph.is_judged,
    ),
    Stage(
        REPORT,
        "domain method",
        lambda g, k, _: [
            *g.of(k, MEASURE, EVALUATE, TRAIN, SAMPLE, REWARD_MODEL),
            *(g.pool(k, SCORE) if k else ()),
            *(replace(p, stage=stage) for p in g.fixed() for stage in (EVALUATE, MEASURE)),
        ],
        lambda g, k: True,
    ),
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}
OF_SETS = (EVALUATE, JUDGE)  # cut into rows of sets, each for a policy or pair
TRAININGS = {stage.key: stage for stage in _STAGES if stage.training}  # by the config's section


def cut(rows: int, group: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Cut rows into at most `shards` runs of whole groups, as even as possible, none empty."""
    groups = -(-rows // group)
    if not groups:
        return ()
    shards = min(shards, groups)
    edges = [min(rows, groups * i // shards * group) for i in range(shards + 1)]
    return tuple(itertools.pairwise(edges))

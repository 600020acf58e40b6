"""`from`: what another run has made that this one would make alike is taken from there.

Runs so share a start: frozen data, the trainings before iteration 1, the evaluation of the policy
that they make, and iteration 1's draw, samples and rewards. A piece is taken, by the checksums of
its files, where the same decides it in both runs and it is made from the same. What runs differ in
from there on is their method, whose labels are put anew on another's rewards.
"""

import dataclasses
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alt_hpc.config import Config, rules
from alt_hpc.data import draws, texts
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import (
    EVALUATE,
    JUDGE,
    MEASURE,
    METHOD,
    OWN,
    REWARD_MODEL,
    SAMPLE,
    SCORE,
    SFT,
    STAGES,
    VALID,
    Graph,
    Piece,
    Shard,
    Sharding,
)
from alt_hpc.plan import Done, State, is_whole
from alt_hpc.run import attempt, code, files, models, rows
from alt_hpc.run.folder import RunFolder, flat
from alt_hpc.run.layout import MODEL_FOLDER, POLICY_FOLDER
from alt_hpc.run.manifests import Manifest, PieceDamaged
from alt_hpc.settings import digest

TRAINED, FROM = (SFT, REWARD_MODEL), "from"
SHARED = {0: (*TRAINED, EVALUATE, MEASURE), 1: (SAMPLE, SCORE)}  # stages, by their iteration


@dataclass(frozen=True)
class Start:
    """What a run that has not begun takes of another."""

    of: RunFolder
    draws: Mapping[int, Mapping[str, Any]]  # of the other, as this run's would be
    graph: Graph  # of this run, cut like that
    whole: Mapping[Piece, Manifest]  # the other's, of the pieces that are taken
    missing: tuple[Piece, ...]  # would be taken, and are not whole there
    anew: Mapping[str, str]  # what is made anew, and why

    @property
    def needed(self) -> list[Piece]:
        """Those missing without which training cannot begin."""
        stages = self.graph.needed_by_training()
        return [piece for piece in self.missing if piece.stage in stages]

    def done(self) -> dict[Piece, Done]:
        """What is taken, as a plan sees it."""
        sums = {piece: manifest.checksum for piece, manifest in self.whole.items()}
        made_from = {piece: {s: sums[s] for s in self.graph.sources(piece)} for piece in sums}
        return {piece: Done(sums[piece], 0, made_from[piece]) for piece in sums}

    def __str__(self) -> str:
        """One line: what is taken, and what is made anew and why."""
        taken = ", ".join(dict.fromkeys(f"{p.stage} {p.iteration}" for p in self.whole))
        anew = ", ".join(f"{what} ({why})" for what, why in self.anew.items())
        made = f"; made anew: {anew}" if anew else ""
        return f"from {self.of.path}: {taken or 'no piece'} taken{made}"


def alike(config: Config, other: Config) -> bool:
    """Whether runs of two configs, yet to begin, can share all trainings before iteration 1, and,
    where there are none, its samples.
    """
    cut = Sharding(((0, 1),), (Shard(OWN, VALID, 0, 1),))
    graphs = [Graph(one, {0: cut, 1: cut}) for one in (config, other)]
    trained, theirs = ([g.decides(p) for p in g.of(0, *TRAINED)] for g in graphs)
    samples = [graph.decides(Piece(1, SAMPLE)) for graph in graphs]
    return trained == theirs and (bool(trained) or samples[0] == samples[1])


def together(configs: Iterable[Config]) -> list[Config]:
    """Configs of one command: of those that can share a start, the others take the first one's.

    Not where a run has begun already, nor where no job can wait (cluster.chain: presubmitted).
    """
    found: list[Config] = []
    for config in configs:
        makers = [one for one in found if one.start_from is None and alike(config, one)]
        begun = bool(RunFolder(config.run).layout.draws())
        own = begun or config.start_from or config.cluster.chain == "presubmitted"
        if makers and not own:
            config = config.model_copy(update={"start_from": makers[0].run})
        found.append(config)
    return found


def named(config: Config) -> RunFolder:
    """The run that a config takes from; InputError where it is none that can be read."""
    run = RunFolder(config.start_from or "")
    if run.path.resolve() == Path(config.run).resolve():
        raise InputError(f"{run.path}: is this run itself", FROM)
    with blaming(FROM):
        run.config()
    return run


def waits(run: RunFolder) -> bool:
    """Whether a run takes from another and has not done so."""
    return run.config().start_from is not None and 0 not in run.layout.draws()


def check(run: RunFolder, other: RunFolder, deepspeed: Mapping[str, Any]) -> None:
    """Raise InputError where what both runs name alike has not the same bytes in both.

    That is a model, a file of the user's, a DeepSpeed JSON (`deepspeed`: this run's, by path).
    """
    config = run.config()
    names = {file for _, reward in rules.rewards(config) for file in reward.files().values()}
    found = models.differing(run, other) + code.differing(run, other, names)
    if other.exists() and deepspeed:
        sections = [getattr(config, STAGES[stage].key) for stage in TRAINED]
        paths = [section.deepspeed for section in sections if section and section.deepspeed]
        theirs = other.facts()["deepspeed"]
        found += [path for path in paths if deepspeed[path] != theirs.get(path, deepspeed[path])]
    if found:
        raise InputError(f"{found[0]}: had other bytes when {other.path} began", FROM)


def offered(run: RunFolder) -> Start | None:
    """What a run can take of the one that its config names; None where it waits for none.

    Reads only. InputError where a training is made there with other settings.
    """
    if not waits(run):
        return None
    two = _Two.of(run, named(run.config()))
    pieces = [p for k, stages in SHARED.items() for p in two.ours.of(k, *stages)]
    whys, anew = two.whys(pieces), dict[str, str]()
    for piece, why in whys.items():
        if why:
            anew.setdefault(f"{piece.stage} {piece.iteration}", why)
    for stage in TRAINED:
        if f"{stage} 0" in anew:
            why = anew[f"{stage} 0"]
            raise InputError(f"{two.other.path}: does not make this run's {stage}: {why}", FROM)
    shared = [piece for piece in pieces if not whys[piece]]
    state = State(two.theirs, two.other.manifests.done(shared))
    whole: dict[Piece, Manifest] = {}
    for piece in shared:
        manifest = two.other.manifests.get(piece) if is_whole(state, piece) else None
        if manifest and not manifest.removed and whole.keys() >= {*two.ours.sources(piece)}:
            whole[piece] = manifest
    missing = tuple(piece for piece in shared if piece not in whole)
    anew |= {f"{piece.stage} {piece.iteration}": "not whole there" for piece in missing}
    return Start(two.other, two.draws, two.ours, whole, missing, anew)


def require(start: Start) -> None:
    """Raise InputError where what training is made from is not whole in the other run."""
    for piece in start.needed:
        ended = start.of.ended()
        how = f"that run has ended ({ended[1]})" if ended else "submit again when it is"
        raise InputError(f"{start.of.path}: {piece} is not whole there: {how}", FROM)


def take(run: RunFolder, start: Start) -> None:
    """Make what is whole there the run's own, with its draws; then the run has begun.

    InputError where a file has not the bytes that its manifest says.
    """
    taken: dict[Piece, Manifest] = {}
    for piece in start.whole:
        try:
            folder, theirs = start.of.manifests.open(piece)
        except PieceDamaged as error:
            raise InputError(f"{piece} is not whole there: {error}", FROM) from error
        made = attempt.begin(run, piece, 0)
        about = {**theirs.facts, FROM: str(start.of.path)}
        fingerprint, entries = digest(start.graph.decides(piece)), dict(theirs.files)
        if piece.stage == SCORE and fingerprint != theirs.fingerprint:
            about |= _label_anew(run, piece, folder, made.folder)
            name = run.layout.rows(piece)
            path = made.folder / name
            entries = {name: {"size": path.stat().st_size, "sha256": files.sha256(path)}}
        else:
            for name in entries:
                files.take(folder / name, made.folder / name)
        inputs = {str(source): taken[source].checksum for source in start.graph.sources(piece)}
        taken[piece] = dataclasses.replace(
            theirs,
            attempt=0,
            folder=made.folder.name,
            files=entries,
            fingerprint=fingerprint,
            inputs=inputs,
            facts=about,
        )
        taken[piece].write(run.layout.manifest(piece))
        if piece == start.graph.policy(0):
            files.link(run.layout.policy(0), made.folder / POLICY_FOLDER)
        if piece == start.graph.reward_model():
            files.link(run.layout.reward_model, made.folder / MODEL_FOLDER)
    for k in sorted(start.draws, reverse=True):  # what says that the run has begun comes last
        run.begin(k, start.draws[k], start.graph.shardings[k])
    print(start, flush=True)


def _label_anew(run: RunFolder, piece: Piece, theirs: Path, ours: Path) -> dict[str, int]:
    """Another's rewards with this run's labels, as `score` would write them; the piece's facts."""
    from alt_hpc.stages import score  # what plans and submits has no other use for stages

    name, method = run.layout.rows(piece), run.config().method
    found = [score.labelled(row, method) for row in files.read_lines(theirs / name)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    (ours / name).write_text("".join(lines), encoding="utf-8")
    return score.facts(found)


@dataclass(frozen=True)
class _Two:
    """A run that takes and the one that it takes from."""

    ours: Graph
    theirs: Graph
    other: RunFolder
    draws: Mapping[int, Mapping[str, Any]]  # the other's, as this run's would be
    rows: Container[str]  # names of frozen rows that are the same in both

    @classmethod
    def of(cls, run: RunFolder, other: RunFolder) -> "_Two":
        config, same = run.config(), _same_rows(run, other)
        found = {k: {**draws.written(other, k), JUDGE: []} for k in SHARED}  # which is not taken
        total = rows.count(other, texts.PROMPTS)
        if texts.PROMPTS in same and found[1]["rows"] == draws.drawn(config, 1, total):
            found[1] = {**found[1], EVALUATE: []}  # its evaluation is not taken
        else:
            del found[1]
        cuts = {k: draws.sharding(run, k, found.get(k)) for k in SHARED}
        theirs = {k: draws.sharding(other, k) for k in SHARED}
        return cls(Graph(config, cuts), Graph(other.config(), theirs), other, found, same)

    def whys(self, pieces: Iterable[Piece]) -> dict[Piece, str]:
        """Why the other run does not make these pieces alike, sources first; empty: it does."""
        found: dict[Piece, str] = {}
        for piece in pieces:
            sources, theirs = self.ours.sources(piece), list[Piece]()
            why = "it is not made there"
            if piece in self.theirs.of(piece.iteration, piece.stage):
                why, theirs = self._why_not(piece), self.theirs.sources(piece)
            for source in sources if not why else ():
                if source not in theirs or found.get(source):
                    why = f"it is made from {source.stage} {source.iteration}"
            found[piece] = why
        return found

    def _why_not(self, piece: Piece) -> str:
        """As `whys`, of what decides a piece beside its sources."""
        mine, theirs = (_decides(graph, piece) for graph in (self.ours, self.theirs))
        names = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
        if names:
            return f"another {', '.join(names[:3])} there"
        if other := [name for name in _rows(self.ours, piece) if name not in self.rows]:
            return f"other rows there ({', '.join(other)})"
        if piece.iteration not in self.draws:
            return "another draw there"
        both = [graph.decides(piece)[1:] for graph in (self.ours, self.theirs)]
        return "" if both[0] == both[1] else "other shards there"


def _decides(graph: Graph, piece: Piece) -> dict[str, str]:
    """The keys of a config that decide a piece, with their values; labels can be put anew."""
    sections = graph.decides(piece)[0]
    if piece.stage == SCORE:
        del sections[METHOD]
    return {name.replace(".bare", ""): text for name, text in flat(sections).items()}


def _rows(graph: Graph, piece: Piece) -> list[str]:
    """Names of the frozen rows that a piece reads."""
    if shard := graph.shard(piece):
        return [texts.of_set(graph.config, shard.set)]
    pairs = [one.name for one in texts.wanted(graph.config) if one.field == "data.comparisons"]
    learned = {REWARD_MODEL: pairs, SFT: [texts.labelled(graph.config)]}
    return learned.get(piece.stage, [texts.PROMPTS])


def _same_rows(run: RunFolder, other: RunFolder) -> set[str]:
    """Names of rows that are the same in both runs, or would be taken."""
    same = {one.name for one in texts.alike(run.config(), other)}
    for one in texts.wanted(run.config()):
        if rows.is_frozen(run, one.name):
            theirs = rows.is_frozen(other, one.name) and rows.checksum(other, one.name)
            same -= {one.name}
            same |= {one.name} if theirs == rows.checksum(run, one.name) else set()
    return same

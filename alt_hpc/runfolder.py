"""The run folder: the only module that knows file names, and what says that a piece is whole.

RUN/
  run.json                     run id, frozen settings and their fingerprint, resolved models
  config.json                  the whole config as last submitted (cluster settings may change)
  data/NAME.jsonl              frozen rows of text, with NAME.offsets (byte of each row) beside
  iterations/001/draw.json     the prompts drawn and how the iteration is cut into shards
  iterations/001/sample/00003/manifest.json        which attempt counts, and that it is whole
  iterations/001/sample/00003/attempt-1/...        what an attempt wrote (kept.jsonl: until whole)
  policies/001 -> ...          links to the exported checkpoints
  journal.jsonl                what controllers intended and submitted
  jobs/1-sample-1/             submitit's scripts and pickles, and the logs of that array
  tensorboard/                 curves
  report.md, curves.png        the table and the picture
  STOPPED / FINISHED           one sentence, once the run has ended
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alt_hpc import config as configs
from alt_hpc import interrupt, pieces
from alt_hpc.config import Config
from alt_hpc.errors import InputError
from alt_hpc.pieces import Piece, Sharding
from alt_hpc.plan import Done, Job, Outcome, Submission

ROWS = {  # the rows that an attempt writes
    "sample": "samples.jsonl",
    "score": "scores.jsonl",
    "evaluate": "evaluations.jsonl",
}
POLICY = "policy"  # an exported checkpoint, within its attempt
REWARD_MODEL = "model"
METRICS = "metrics.jsonl"  # what each optimiser step measured
MOST, LAGS = 0.6, 3.0  # a shard lags: this share is whole, and it takes so many times as long
KEPT = "kept.jsonl"  # prompt groups that an attempt has finished
REPORT = "report.json"
LOOK_EVERY_S = 60.0  # how often a task looks whether it lags
VISIBLE_WITHIN_S = 60.0  # how long a file written on another node may stay hidden by NFS caches


class PieceDamaged(RuntimeError):
    """A file of a piece does not have the bytes that its manifest says; it has been withdrawn."""


@dataclass(frozen=True)
class Manifest:
    """What says that a piece is whole; written last."""

    attempt: int
    folder: str  # of the attempt, within the piece's folder
    rows: int
    files: Mapping[str, Mapping[str, Any]]  # name within `folder` -> size, sha256
    fingerprint: str
    inputs: Mapping[str, str]  # str(piece) -> checksum
    facts: Mapping[str, Any]  # what later pieces want to know cheaply
    removed: bool = False  # the files were removed on purpose (`keep`)

    @property
    def checksum(self) -> str:
        """sha256 (hex) over the files' names and checksums."""
        return configs.digest({name: entry["sha256"] for name, entry in self.files.items()})


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def node_name() -> str:
    """This machine as Slurm calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME", os.uname().nodename)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: a reader sees the old or the new text, never a part, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line durably; a torn line of a killed writer is closed first."""
    line = json.dumps(value) + "\n"
    torn = _last_byte(path) not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + line)
        file.flush()
        os.fsync(file.fileno())


def _last_byte(path: Path) -> bytes:
    if not path.exists() or not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file that may end in, or contain, a torn line (skipped)."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


class RunFolder:
    """A run on disk. Cheap to construct: nothing is read before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._facts: dict[str, Any] | None = None
        self._config: Config | None = None
        self._shardings: dict[int, Sharding] | None = None

    # ------------------------------------------------------------------ the run itself

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make the run folder, or open the one that is there when it belongs to this config.

        Raises
        ------
        InputError
            It cannot be written, belongs to somebody else, or to a config with other content.
        """
        folder = cls(config.run)
        folder._check_place()
        if folder._run_file.exists():
            folder._check_same(config)
        else:
            strange = folder._strange()
            if strange:
                raise InputError(
                    f"{folder.path}: the folder is not empty and holds no run (found {strange[0]})",
                    "run",
                )
        os.chmod(folder.path, 0o700)  # only now is it known to be a run's
        return folder

    def _strange(self) -> list[str]:
        """What a folder without run.json holds that freezing data has not put there."""
        outer = {p.name for p in self.path.iterdir()} - {"data", "tensorboard"}
        data = self.path / "data"
        inner = {p.name for p in data.iterdir()} if data.is_dir() else set()
        ours = ("prompts-", "comparisons-", ".prompts-", ".comparisons-")
        return sorted(outer) + sorted(f"data/{n}" for n in inner if not n.startswith(ours))

    def abandon(self) -> None:
        """Wrong input was found before the run was frozen: leave nothing half made."""
        if self.exists() or self._strange():
            return
        shutil.rmtree(self.path / "data", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def freeze(
        self, config: Config, models: Mapping[str, str], deepspeed: Mapping[str, Any]
    ) -> None:
        """Write down the run: config, fingerprint, where its models were found, DeepSpeed JSONs."""
        if not self._run_file.exists():
            facts = {
                "run_id": self.run_id,
                "fingerprint": config.fingerprint(),
                "frozen": config.frozen(),
                "models": dict(models),
                "deepspeed": dict(deepspeed),
                "created": time.time(),
            }
            write_atomically(self._run_file, json.dumps(facts, indent=1))
        write_atomically(
            self.path / "config.json", json.dumps(dataclasses.asdict(config), indent=1)
        )
        self._facts = self._config = None

    @classmethod
    def preview(cls, config: Config) -> RunFolder:
        """The run folder as it would be with this config; nothing is written."""
        folder = cls(config.run)
        if folder.exists():
            folder._check_same(config)
        elif any(p.exists() and not p.is_dir() for p in (folder.path, *folder.path.parents)):
            raise InputError(f"{folder.path}: a file is in the way of the run folder", "run")
        folder._config = config
        return folder

    def exists(self) -> bool:
        return self._run_file.exists()

    @property
    def _run_file(self) -> Path:
        return self.path / "run.json"

    def _check_place(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot make the run folder ({error.strerror})", "run"
            ) from error
        owner = self.path.stat().st_uid
        if owner != os.getuid():
            raise InputError(
                f"{self.path}: the folder belongs to user {owner}, not to you; choose another",
                "run",
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise InputError(f"{self.path}: the run folder cannot be written", "run")
        probe = self.path / f".probe-{secrets.token_hex(4)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{self.path}: the run folder cannot be written ({error.strerror})", "run"
            ) from error

    def check_owner(self) -> None:
        """Stop where the folder is not ours alone: jobs unpickle what lies in it."""
        found = self.path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise InputError(
                f"{self.path}: the folder must belong to you, with mode 0700"
                f" (owner {found.st_uid}, mode {found.st_mode & 0o777:o})",
                "run",
            )

    @contextlib.contextmanager
    def only_one(self, name: str = "lock", within_s: float = 1.0) -> Iterator[None]:
        """One process at a time. The kernel frees the lock when its holder dies."""
        deadline = time.monotonic() + within_s
        with (self.path / name).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise InputError(
                            f"{self.path}: is being run by another process", "run"
                        ) from None
                    time.sleep(0.2)
            yield

    def in_use(self) -> bool:
        """Whether `alt-hpc run` works in this folder now."""
        try:
            with self.only_one(within_s=0.0):
                return False
        except InputError:
            return True

    def _check_same(self, config: Config) -> None:
        frozen = self.facts()["frozen"]
        if self.facts()["fingerprint"] == config.fingerprint():
            return
        now = config.frozen()
        differing = sorted(
            name
            for name in _flat(now) | _flat(frozen)
            if _flat(now).get(name) != _flat(frozen).get(name)
        )
        raise InputError(
            f"{self.path}: the folder belongs to a run with another"
            f" {', '.join(differing[:3])}; what decides content is frozen:"
            " choose another run folder",
            "run",
        )

    def facts(self) -> dict[str, Any]:
        """run.json."""
        if self._facts is None:
            try:
                self._facts = json.loads(self._run_file.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise InputError(f"{self.path}: not a run folder (run.json is missing)") from None
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise InputError(f"{self._run_file}: damaged: not valid JSON") from None
        assert self._facts is not None
        return self._facts

    @property
    def run_id(self) -> str:
        """Names the run in job comments: a function of its place, so that a plan can show it."""
        return configs.digest(str(self.path))[:8]

    def config(self) -> Config:
        """The config as last submitted."""
        if self._config is None:
            path = self.path / "config.json"
            if not self.exists():
                self.facts()  # says that this is no run folder
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, json.JSONDecodeError) as error:
                raise InputError(f"{path}: cannot be read ({error})") from error
            self._config = configs.from_json(values)
        return self._config

    def model(self, name: str) -> Path:
        """The local folder of a model that the config names (resolved when the run was frozen)."""
        return Path(self.facts()["models"][name])

    # ------------------------------------------------------------------ data and draws

    def write_data(self, name: str, rows: Iterable[Mapping[str, str]]) -> int:
        """Freeze rows of text under a name; returns how many. Row i starts at byte offsets[i]."""
        folder = self.path / "data"
        folder.mkdir(exist_ok=True)
        offsets, position = array("q", [0]), 0
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                for row in rows:
                    position += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    offsets.append(position)
            np.asarray(offsets, dtype="<i8").tofile(folder / f"{name}.offsets")
            os.replace(temporary, folder / f"{name}.jsonl")
        finally:
            temporary.unlink(missing_ok=True)
        facts = {"rows": len(offsets) - 1, "sha256": sha256(folder / f"{name}.jsonl")}
        write_atomically(folder / f"{name}.json", json.dumps(facts))
        return len(offsets) - 1

    def data_facts(self, name: str) -> dict[str, Any]:
        """Rows and sha256 of frozen data."""
        facts: dict[str, Any] = json.loads((self.path / "data" / f"{name}.json").read_text())
        return facts

    def has_data(self, name: str) -> bool:
        return (self.path / "data" / f"{name}.json").exists()

    def read_data(self, name: str, rows: Iterable[int] | None = None) -> list[dict[str, str]]:
        """Rows of frozen data, all or those asked for, after checking the file's checksum."""
        path = self.path / "data" / f"{name}.jsonl"
        if not path.is_file() or sha256(path) != self.data_facts(name)["sha256"]:
            raise InputError(f"{path}: the frozen data was changed since the run began")
        offsets = np.fromfile(path.with_suffix(".offsets"), dtype="<i8")
        wanted = range(len(offsets) - 1) if rows is None else rows
        with path.open("rb") as file:
            return [_read_row(file, int(offsets[i]), int(offsets[i + 1])) for i in wanted]

    def begin(self, iteration: int, draw: Mapping[str, Any], sharding: Sharding) -> None:
        """Write down an iteration's draw and sharding; what is there already stays."""
        path = self._iteration(iteration) / "draw.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, json.dumps({**draw, "sharding": dataclasses.asdict(sharding)}))
        self._shardings = None

    def draw(self, iteration: int) -> dict[str, Any]:
        """The draw: `rows` (indices into the frozen prompts, in order) and further facts."""
        path = self._iteration(iteration) / "draw.json"
        try:
            draw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{path}: damaged: not valid JSON") from None
        return draw

    def shardings(self) -> dict[int, Sharding]:
        """Shardings of all iterations that have begun."""
        if self._shardings is None:
            self._shardings = {}
            for path in sorted((self.path / "iterations").glob("*/draw.json")):
                cut = self.draw(int(path.parent.name))["sharding"]
                self._shardings[int(path.parent.name)] = Sharding(
                    sample=tuple((a, b) for a, b in cut["sample"]),
                    evaluate=tuple((a, b) for a, b in cut["evaluate"]),
                )
        return self._shardings

    # ------------------------------------------------------------------ pieces

    def _iteration(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:03d}"

    def piece_folder(self, piece: Piece) -> Path:
        return self._iteration(piece.iteration) / piece.stage / f"{piece.shard:05d}"

    def manifest(self, piece: Piece) -> Manifest | None:
        """The manifest, if it is there, readable, and its files have their sizes.

        Fast: no file of the piece is opened. The fingerprint must be this config's.
        """
        folder = self.piece_folder(piece)
        try:
            manifest = Manifest(**json.loads((folder / "manifest.json").read_text("utf-8")))
            expected = pieces.fingerprint(self.config(), self.shardings(), piece)
            if manifest.fingerprint != expected:
                return None
            if manifest.removed:
                return manifest
            for name, entry in manifest.files.items():
                if (folder / manifest.folder / name).stat().st_size != entry["size"]:
                    return None
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            return None
        return manifest

    def done(self) -> dict[Piece, Done]:
        """All pieces of the iterations begun that have a good manifest."""
        found: dict[Piece, Done] = {}
        for piece in self.pieces():
            manifest = self.manifest(piece)
            if manifest is not None:
                names = {
                    p: manifest.inputs[str(p)]
                    for p in pieces.inputs(self.config(), self.shardings(), piece)
                    if str(p) in manifest.inputs
                }
                found[piece] = Done(manifest.checksum, manifest.attempt, names)
        return found

    def pieces(self) -> Iterator[Piece]:
        """All pieces of the iterations begun, and those that prepare the run."""
        makers = (pieces.policy(self.config(), 0), pieces.reward_model(self.config()))
        yield from filter(None, makers)
        for k, sharding in self.shardings().items():
            yield from (Piece(k, "evaluate", i) for i in range(len(sharding.evaluate)))
            yield Piece(k, "report")
            if k:
                shards = range(len(sharding.sample))
                yield from (Piece(k, stage, i) for stage in ("sample", "score") for i in shards)
                yield Piece(k, "train")

    def open_piece(self, piece: Piece) -> tuple[Path, Manifest]:
        """The folder of a whole piece, every file's checksum verified.

        A file written on another node may be hidden by an attribute cache for a while: the parent
        is listed and the read tried again for a bounded time.

        Raises
        ------
        PieceDamaged
            The manifest is missing, or a checksum fails (then the manifest is withdrawn, so that
            the next controller has the piece made again).
        """
        manifest = self._await_manifest(piece)
        folder = self.piece_folder(piece) / manifest.folder
        for name, entry in manifest.files.items():
            if not (folder / name).is_file() or sha256(folder / name) != entry["sha256"]:
                self.withdraw(piece)
                raise PieceDamaged(
                    f"{folder / name}: does not have the bytes its manifest says; withdrawn"
                )
        return folder, manifest

    def rows(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Rows of a whole piece, its checksum verified first."""
        return read_lines(self.open_piece(piece)[0] / ROWS[piece.stage])

    def all_rows(self, iteration: int, stage: str) -> Iterator[dict[str, Any]]:
        """Rows of all shards of a stage, in the order of the draw."""
        sharding = self.shardings()[iteration]
        shards = sharding.evaluate if stage == "evaluate" else sharding.sample
        for shard in range(len(shards)):
            yield from self.rows(Piece(iteration, stage, shard))

    def _await_manifest(self, piece: Piece) -> Manifest:
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while True:
            manifest = self.manifest(piece)
            if manifest is not None:
                return manifest
            folder = self.piece_folder(piece)
            fresh = folder.is_dir() and any(p.name.startswith("attempt") for p in folder.iterdir())
            if time.monotonic() > deadline or not fresh:
                raise PieceDamaged(f"{folder}: {piece} is not whole: no good manifest")
            time.sleep(1.0)

    def withdraw(self, piece: Piece) -> None:
        """Take a manifest back: the piece no longer counts."""
        path = self.piece_folder(piece) / "manifest.json"
        path.rename(path.with_name(f"withdrawn-{time.time_ns()}.json"))

    def checksums(self, sources: Iterable[Piece]) -> dict[str, str]:
        """What a manifest says of its inputs: str(piece) -> checksum now."""
        return {str(p): self._await_manifest(p).checksum for p in sources}

    def attempt(self, piece: Piece, number: int) -> Attempt:
        """Begin a try, in a fresh folder. Slurm may run one job twice: the second gets its own."""
        parent = self.piece_folder(piece)
        parent.mkdir(parents=True, exist_ok=True)
        for again in range(1000):
            folder = parent / (f"attempt-{number}" + (f".{again}" if again else ""))
            try:
                folder.mkdir()
                return Attempt(self, piece, number, folder)
            except FileExistsError:
                continue
        raise RuntimeError(f"{parent}: 1000 folders of attempt {number}")

    def began(self, piece: Piece, number: int) -> bool:
        """Whether a try has begun: a task may have died before it came to this piece."""
        return (self.piece_folder(piece) / f"attempt-{number}").exists()

    def write_manifest(self, piece: Piece, manifest: Manifest) -> None:
        text = json.dumps(dataclasses.asdict(manifest), indent=1)
        write_atomically(self.piece_folder(piece) / "manifest.json", text)

    def meeting_file(self, piece: Piece) -> Path:
        """Where the ranks of one start of a job meet; `ALT_HPC_START` is unique to the start."""
        start = os.environ.get("ALT_HPC_START", f"by-hand-{os.getpid()}")
        return self.piece_folder(piece) / f"meeting-{start}.json"

    def checkpoints(self, piece: Piece, inputs: Mapping[str, str]) -> Path:
        """Checkpoints of a training and what its steps measured.

        Shared by its attempts, and left alone by one whose inputs have other checksums.
        """
        return self.piece_folder(piece) / "checkpoints" / configs.digest(dict(inputs))[:12]

    def saved(self, piece: Piece) -> int:
        """Units of work of a piece that outlive the task which did them, whatever made them.

        Prompt groups kept, or the last optimiser step of a whole checkpoint.
        """
        folder = self.piece_folder(piece)
        kept = (sum(1 for _ in read_lines(file)) for file in folder.glob(f"attempt-*/{KEPT}"))
        steps = folder.glob("checkpoints/*/steps/step-*/manifest.json")
        return max([sum(kept), *(int(p.parent.name.removeprefix("step-")) for p in steps)])

    def remove_checkpoints(self, piece: Piece) -> None:
        """Once the piece is whole they are of no use."""
        shutil.rmtree(self.piece_folder(piece) / "checkpoints", ignore_errors=True)

    def identity(self, piece: Piece, inputs: Mapping[str, str]) -> str:
        """Digest of what decides a piece's bytes: settings, rows and inputs."""
        settings = pieces.fingerprint(self.config(), self.shardings(), piece)
        return configs.digest([settings, dict(inputs)])

    def show_progress(self, piece: Piece, done: int, total: int, unit: str, started: float) -> None:
        """Say how far a piece is: `done` of `total` units since `started` (seconds, epoch)."""
        interrupt.beat()
        values = {"done": done, "total": total, "unit": unit, "started": started}
        text = json.dumps({**values, "at": time.time(), "node": node_name()})
        write_atomically(self.progress_file(piece), text)

    def deepspeed(self, path: str | None) -> dict[str, Any]:
        """A DeepSpeed JSON that the config names, as it was when the run was frozen."""
        settings: dict[str, Any] = self.facts()["deepspeed"][path or ""]
        return settings

    # ------------------------------------------------------------------ policies

    def publish_policy(self, piece: Piece, folder: Path) -> None:
        """Link `policies/NNN` to an exported checkpoint."""
        links = self.path / "policies"
        links.mkdir(exist_ok=True)
        temporary = links / f".{secrets.token_hex(4)}"
        temporary.symlink_to(os.path.relpath(folder, links))
        os.replace(temporary, links / f"{piece.iteration:03d}")

    def remove_policy(self, piece: Piece) -> None:
        """Free the disk of an old policy; its manifest stays, saying so."""
        manifest = self.manifest(piece)
        if manifest is None or manifest.removed:
            return
        self.write_manifest(piece, dataclasses.replace(manifest, removed=True))
        shutil.rmtree(self.piece_folder(piece) / manifest.folder / POLICY, ignore_errors=True)
        (self.path / "policies" / f"{piece.iteration:03d}").unlink(missing_ok=True)

    # ------------------------------------------------------------------ journal and jobs

    @property
    def _journal(self) -> Path:
        return self.path / "journal.jsonl"

    def record(self, event: str, **values: Any) -> None:
        """Append to the journal."""
        append_line(self._journal, {"event": event, "time": time.time(), **values})

    def journal(self) -> list[dict[str, Any]]:
        """All journal entries, oldest first."""
        return list(read_lines(self._journal))

    def record_intent(self, job: Job) -> None:
        """Before sbatch: so that a job which dies before Python starts counts as an attempt."""
        self.record(
            "intent",
            key=job.key,
            stage=job.stage,
            iteration=job.iteration,
            attempt=job.attempt,
            shards=job.shards,
            pack=job.pack,
            waits=[[p.iteration, p.stage, p.shard, a] for p, a in job.waits.items()],
        )

    def submissions(self) -> tuple[tuple[Submission, ...], int]:
        """All recorded intents with their job ids, and the index of the first since a person's."""
        found: dict[str, Submission] = {}
        counted_from = 0
        for entry in self.journal():
            match entry["event"]:
                case "submit":
                    counted_from = len(found)
                case "intent":
                    found[entry["key"]] = Submission(
                        entry["stage"],
                        entry["iteration"],
                        entry["attempt"],
                        tuple(entry["shards"]),
                        {Piece(k, stage, i): a for k, stage, i, a in entry["waits"]},
                        entry["pack"],
                    )
                case "submitted" if entry["key"] in found:
                    found[entry["key"]] = dataclasses.replace(found[entry["key"]], job=entry["job"])
        return tuple(found.values()), counted_from

    def record_outcome(self, key: str, piece: Piece, end: Outcome) -> None:
        """How a submission of a piece ended that did not make it whole."""
        where = {"piece": [piece.iteration, piece.stage, piece.shard]}
        self.record("outcome", key=key, **where, **dataclasses.asdict(end))

    def outcomes(self) -> dict[tuple[str, Piece], Outcome]:
        """How submissions (by job key) of pieces ended that are not whole, as controllers found."""
        return {
            (e["key"], Piece(*e["piece"])): Outcome(e["state"], tuple(e["nodes"]), e["saved"])
            for e in self.journal()
            if e["event"] == "outcome"
        }

    def jobs_folder(self, job: Job) -> Path:
        """Scripts, pickles and logs of one submission; mode 0700: submitit unpickles here."""
        return self.path / "jobs" / f"{job.iteration}-{job.stage}-{job.attempt}"

    def make_jobs_folder(self, job: Job) -> Path:
        folder = self.jobs_folder(job)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder.parent, 0o700)
        return folder

    def controller_folder(self) -> Path:
        folder = self.path / "jobs" / "controller"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder.parent, 0o700)
        return folder

    # ------------------------------------------------------------------ progress and ends

    def progress_file(self, piece: Piece) -> Path:
        return self.piece_folder(piece) / "progress.json"

    def progress(self, piece: Piece) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads(self.progress_file(piece).read_text())
            return value
        except (OSError, json.JSONDecodeError):
            return None

    def laggards(self, iteration: int, stage: str) -> list[str]:
        """A line for each shard that lags far behind, once most shards of its stage are whole."""
        sharding = self.shardings()[iteration]
        shards = sharding.evaluate if stage == "evaluate" else sharding.sample
        if stage not in ROWS or len(shards) < 3:
            return []
        found = {i: self.manifest(Piece(iteration, stage, i)) for i in range(len(shards))}
        took = sorted(m.facts["seconds"] for m in found.values() if m is not None)
        if len(took) < MOST * len(shards):
            return []
        usual, lines = took[len(took) // 2], []
        for piece in (Piece(iteration, stage, i) for i, m in found.items() if m is None):
            now = self.progress(piece)
            if now is not None and time.time() - now["started"] > LAGS * max(usual, LAGS):
                so_far = time.time() - now["started"]
                lines.append(
                    f"{piece} lags on {now.get('node')}: {so_far:.0f} s so far,"
                    f" {now['done']}/{now['total']} {now['unit']}; the others took {usual:.0f} s"
                )
        return lines

    def tensorboard(self, kind: str) -> Path:
        return self.path / "tensorboard" / kind

    @property
    def report_file(self) -> Path:
        return self.path / "report.md"

    @property
    def curves_file(self) -> Path:
        return self.path / "curves.png"

    def end(self, how: str, sentence: str) -> None:
        """Write STOPPED or FINISHED."""
        write_atomically(self.path / how, sentence + "\n")

    def ended(self) -> tuple[str, str] | None:
        """How the run ended and the sentence, if it has."""
        for how in ("FINISHED", "STOPPED"):
            if (self.path / how).exists():
                return how, (self.path / how).read_text().strip()
        return None

    def reopen(self) -> None:
        """A person submits again: an earlier end no longer holds."""
        for how in ("FINISHED", "STOPPED"):
            (self.path / how).unlink(missing_ok=True)


class Attempt:
    """One try at a piece, writing in a folder of its own; `commit` makes the piece whole."""

    def __init__(self, run: RunFolder, piece: Piece, number: int, folder: Path) -> None:
        self.run = run
        self.piece = piece
        self.number = number
        self.folder = folder
        self.started = time.time()
        self._shown = 0.0
        self._looked = self.started

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far this try is, at most once a second."""
        now = time.time()
        if now - self._shown < 1.0 and done < total:
            return
        self._shown = now
        self.run.show_progress(self.piece, done, total, unit, self.started)
        if now - self._looked > LOOK_EVERY_S:
            self._looked = now
            for line in self.run.laggards(self.piece.iteration, self.piece.stage):
                if line.startswith(f"{self.piece} "):
                    print(line, flush=True)

    def commit(
        self,
        files: Iterable[str],
        *,
        rows: int,
        inputs: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Declare the piece whole: all files are written and closed. The manifest comes last."""
        entries = {}
        for name in sorted(files):
            path = self.folder / name
            entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        run, piece = self.run, self.piece
        when = {"started": self.started, "seconds": time.time() - self.started}
        where = {"node": node_name()}
        manifest = Manifest(
            attempt=self.number,
            folder=self.folder.name,
            rows=rows,
            files=entries,
            fingerprint=pieces.fingerprint(run.config(), run.shardings(), piece),
            inputs=dict(inputs),
            facts={**when, **where, **(facts or {})},
        )
        run.write_manifest(piece, manifest)
        return manifest

    def resumable(
        self,
        inputs: Mapping[str, str],
        starts: Sequence[int],
        make: Callable[[Iterator[int]], Iterator[list[dict[str, Any]]]],
        unit: str,
        each: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> list[dict[str, Any]]:
        """Rows of all prompt groups, in order; groups that an earlier attempt kept are not made.

        Parameters
        ----------
        inputs
            Checksums of what the rows are made from: rows made from others are not taken.
        starts
            Number of the first row of each group, and last the number after the last row.
        make
            Given the indices of the groups to make, gives the rows of each, in order. It may
            begin some before it has given the one before; a killed task loses all begun.
        unit, each
            What progress counts, and how many of it a row is.
        part
            Which of how many passes over the rows this is.

        Raises
        ------
        Interrupted
            The task was asked to stop; every group made so far is kept.
        """
        identity = configs.digest([self.run.identity(self.piece, inputs), part])
        kept = self._kept(identity)
        size = (starts[-1] - starts[0]) * each
        before, total = size * part[0], size * part[1]
        rows: list[dict[str, Any]] = []
        mine = {start: kept[start] for start in starts[:-1] if start in kept}
        if mine:
            print(f"{self.piece}: {len(mine)} of {len(starts) - 1} prompt groups kept", flush=True)
        self.progress(before + sum(map(len, mine.values())) * each, total, unit)
        groups = make(group for group, start in enumerate(starts[:-1]) if start not in mine)
        for start in starts[:-1]:
            made = mine.get(start)
            if made is None:
                interrupt.check()
                made = next(groups)
                self._keep(identity, start, made)
            rows += made
            done = len(rows) + sum(len(r) for s, r in mine.items() if s > start)
            self.progress(before + done * each, total, unit)
        return rows

    def _keep(self, identity: str, start: int, rows: list[dict[str, Any]]) -> None:
        text = json.dumps(rows, ensure_ascii=False)
        line = {"identity": identity, "start": start, "rows": text}
        line["sha256"] = configs.digest(line)
        append_line(self.folder / KEPT, line)

    def _kept(self, identity: str) -> dict[int, list[dict[str, Any]]]:
        """Whole groups that earlier attempts kept: number of the first row -> rows.

        A torn or changed line is as if it were not there.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for file in sorted(self.run.piece_folder(self.piece).glob(f"attempt-*/{KEPT}")):
            for line in read_lines(file):
                whole = line.pop("sha256", None) == configs.digest(line)
                if whole and line.get("identity") == identity:
                    found[line["start"]] = json.loads(line["rows"])
        return found

    def commit_rows(self, rows: Iterable[Mapping[str, Any]], **commit: Any) -> Manifest:
        """Write rows as JSON lines and commit them; what attempts kept is of no more use."""
        name, count = ROWS[self.piece.stage], 0
        with (self.folder / name).open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        manifest = self.commit([name], rows=count, **commit)
        for old in self.run.piece_folder(self.piece).glob(f"attempt-*/{KEPT}"):
            old.unlink(missing_ok=True)
        return manifest


def _read_row(file: Any, start: int, end: int) -> dict[str, str]:
    file.seek(start)
    row: dict[str, str] = json.loads(file.read(end - start))
    return row


def _flat(values: Mapping[str, Any], name: str = "") -> dict[str, str]:
    """A nested mapping as dotted names."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}{key}.")
        else:
            flat[name + key] = json.dumps(value)
    return flat

"""Where everything of a run lies: the only module that knows the names below RUN/.

RUN/
  run.json                     format, run id, frozen settings and their fingerprint
  models.json                  where its models lie, and the checksums of their files
  config.json                  the whole config as last submitted (cluster settings may change)
  code/alt_hpc/                the product's code as the run began with it: its jobs run from there
  packages/STAGE.json          versions that the first task of a stage found
  data/NAME.jsonl              frozen rows of text, with NAME.offsets (byte of each row) beside
  iterations/001/draw.json     the prompts drawn and how the iteration is cut into shards
  iterations/001/sample/00003/manifest.json        which attempt counts, and that it is whole
  iterations/001/sample/00003/attempt-1/...        what an attempt wrote (kept.jsonl: until whole)
  iterations/001/train/00000/checkpoints/HASH/     DeepSpeed's, of a training made from HASH
  policies/001 -> ...          links to the exported checkpoints
  journal.jsonl                what controllers intended and submitted
  jobs/1-sample-1/             submitit's scripts and pickles, and the logs of that array
  jobs/controller/             the controllers' script and logs
  tensorboard/                 curves
  report.md, curves.png        the table and the picture
  STOPPED / FINISHED           one sentence, once the run has ended

Everything here is a name: nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alt_hpc.graph import STAGES, Piece

DATA = ("prompts", "comparisons", "set")  # frozen as NAME-SPLIT
POLICY_FOLDER = "policy"  # within an attempt: an exported checkpoint
MODEL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"  # what each optimiser step measured
REPORT_FILE = "report.json"
KEPT_FILE = "kept.jsonl"  # prompt groups that an attempt has finished
MANIFEST_FILE = "manifest.json"
ENDS = ("FINISHED", "STOPPED")
CONTROLLER = "controller"


class Layout:
    """The names below one run's folder.

    Attributes
    ----------
    path
        The run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path / "run.json"
        self.config = path / "config.json"
        self.models = path / "models.json"
        self.data = path / "data"
        self.policies = path / "policies"
        self.journal = path / "journal.jsonl"
        self.jobs = path / "jobs"
        self.tensorboard = path / "tensorboard"
        self.table = path / "report.md"
        self.curves = path / "curves.png"
        self.lock = path / "lock"
        self.controller_lock = path / "controller.lock"

    def end(self, how: str) -> Path:
        """`STOPPED` or `FINISHED`."""
        return self.path / how

    # ------------------------------------------------------------------ what it is made with

    @property
    def code(self) -> Path:
        """Where the jobs of the run import the product from."""
        return self.path / "code"

    @property
    def package(self) -> Path:
        return self.code / "alt_hpc"

    def packages(self, stage: str) -> Path:
        """The versions of packages that the first task of a stage found."""
        return self.path / "packages" / f"{stage}.json"

    def all_packages(self) -> list[Path]:
        return [self.packages(stage) for stage in STAGES]

    # ------------------------------------------------------------------ frozen data

    def texts(self, name: str) -> Path:
        """Frozen rows of text."""
        return self.data / f"{name}.jsonl"

    def offsets(self, name: str) -> Path:
        """The byte at which each of these rows starts."""
        return self.data / f"{name}.offsets"

    def data_facts(self, name: str) -> Path:
        """How many they are, and their checksum; written last."""
        return self.data / f"{name}.json"

    def is_data(self, name: str) -> bool:
        """Whether a file of this name in `data` is frozen, or half frozen, by us."""
        return name.lstrip(".").startswith(tuple(f"{data}-" for data in DATA))

    # ------------------------------------------------------------------ iterations and pieces

    def iteration(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:03d}"

    def draw(self, iteration: int) -> Path:
        return self.iteration(iteration) / "draw.json"

    def draws(self) -> Iterator[int]:
        """The iterations that have begun."""
        for path in sorted((self.path / "iterations").glob("*/draw.json")):
            yield int(path.parent.name)

    def piece(self, piece: Piece) -> Path:
        return self.iteration(piece.iteration) / piece.stage / f"{piece.shard:05d}"

    def manifest(self, piece: Piece) -> Path:
        return self.piece(piece) / MANIFEST_FILE

    def withdrawn(self, piece: Piece, when: int) -> Path:
        """Where a manifest is put that no longer counts."""
        return self.piece(piece) / f"withdrawn-{when}.json"

    def progress(self, piece: Piece) -> Path:
        return self.piece(piece) / "progress.json"

    def attempt(self, piece: Piece, number: int, again: int = 0) -> Path:
        """Slurm may start one attempt twice: `again` counts."""
        return self.piece(piece) / (f"attempt-{number}" + (f".{again}" if again else ""))

    def verdict(self, piece: Piece, number: int) -> Path:
        """What an attempt says of its own end."""
        return self.piece(piece) / f"verdict-{number}.json"

    def attempts(self, piece: Piece) -> list[Path]:
        return sorted(self.piece(piece).glob("attempt-*"))

    def kept(self, piece: Piece) -> list[Path]:
        """What attempts have kept of their prompt groups."""
        return [file for attempt in self.attempts(piece) if (file := attempt / KEPT_FILE).exists()]

    def rows(self, piece: Piece) -> str:
        """The rows that a piece is, within an attempt."""
        return f"{STAGES[piece.stage].rows}.jsonl"

    def meeting(self, piece: Piece, start: str) -> Path:
        """Where the ranks of one start of a job meet."""
        return self.piece(piece) / f"meeting-{start}.json"

    # ------------------------------------------------------------------ checkpoints of a training

    def trainings(self, piece: Piece) -> Path:
        return self.piece(piece) / "checkpoints"

    def training(self, piece: Piece, sources: str) -> Path:
        """Checkpoints and metrics of a training from sources of this digest."""
        return self.trainings(piece) / sources[:12]

    def metrics(self, training: Path) -> Path:
        return training / METRICS_FILE

    def steps(self, training: Path) -> Path:
        return training / "steps"

    def steps_saved(self, piece: Piece) -> list[int]:
        """The optimiser steps after which a whole checkpoint was saved."""
        found = self.trainings(piece).glob(f"*/steps/{step_name('*')}/{MANIFEST_FILE}")
        return [step_number(path.parent) for path in found]

    # ------------------------------------------------------------------ jobs

    def job(self, iteration: int, stage: str, attempt: int) -> Path:
        """Scripts, pickles and logs of one submission."""
        return self.jobs / f"{iteration}-{stage}-{attempt}"

    def controller_script(self) -> Path:
        return self.jobs / CONTROLLER / "controller.sh"

    def controller_log(self, job: str = "%j") -> Path:
        """The log of a controller; Slurm fills in the job's id."""
        return self.jobs / CONTROLLER / f"{job}.log"

    # ------------------------------------------------------------------ results

    def policy(self, iteration: int) -> Path:
        """The link to the policy after an iteration."""
        return self.policies / f"{iteration:03d}"

    def events(self, kind: str) -> Path:
        """TensorBoard's events of one kind of curves."""
        return self.tensorboard / kind


def task_log(folder: Path, element: str, rank: int) -> Path:
    """The log of one process of a job, where submitit puts it."""
    return folder / f"{element}_{rank}_log.out"


def step_name(step: int | str) -> str:
    """A checkpoint's folder among the `steps` of a training."""
    return f"step-{step:06d}" if isinstance(step, int) else f"step-{step}"


def step_number(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def random_state(checkpoint: Path, rank: int) -> Path:
    """The random generators of a rank, within a checkpoint."""
    return checkpoint / f"random-{rank:05d}.json"

"""Where everything of a run lies: the only module that knows the names below RUN/.

RUN/iterations/001/sample/00003/ is a piece: its manifest, and a folder for what each attempt wrote.
No file is opened here.
"""

from pathlib import Path

from alt_hpc.graph import COMPARISONS, REPORT, REWARD_MODEL, SFT, STAGES, Piece
from alt_hpc.settings import digest

_KINDS = ("prompts", SFT, COMPARISONS, "set")
DATA = tuple(f"{kind}-" for kind in _KINDS)  # NAME-SPLIT of frozen rows
POLICY_FOLDER = "policy"  # within an attempt: an exported checkpoint
MODEL_FOLDER = "model"
MOMENTS_FILE = "moments.safetensors"  # of Adam, for the next iteration's training
METRICS_FILE = "metrics.jsonl"  # what each optimiser step measured
REPORT_FILE = "report.json"
PAGE_FILE = "report.md"
KEPT_FILE = "kept.jsonl"  # prompt groups that an attempt has finished, until the piece is whole
MANIFEST_FILE = "manifest.json"  # which attempt counts, and that the piece is whole
REPLIES_FILE = "replies.jsonl"  # of judges, each written down as it comes
WITHDRAWN = "withdrawn-{}.json"  # where a manifest is put that no longer counts
PROGRESS_FILE = "progress.json"
STEPS, STEP = "step-*", "step-{:06d}"  # a checkpoint's folder among the `steps` of a training
RANDOM_STATE = "random-{:05d}.json"  # the random generators of a rank, within a checkpoint


class Layout:  # the names below one run's folder
    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path / "run.json"  # format, run id, frozen settings and their fingerprint
        self.models = path / "models.json"  # where they lie, and the checksums of their files
        self.config = path / "config.json"  # all, as last submitted (the cluster's may change)
        self.code = path / "code"  # from here the jobs of the run import the product
        self.package = self.code / "alt_hpc"  # as the run began with it
        self.data = path / "data"
        self.iterations = path / "iterations"
        self.journal = path / "journal.jsonl"  # what controllers intended and submitted
        self.jobs = path / "jobs"  # submitit's scripts and pickles, and the logs
        self.controller_script = self.jobs / "controller" / "controller.sh"
        self.controller_log = self.jobs / "controller" / "%j.log"  # Slurm fills in the job's id
        self.tensorboard = path / "tensorboard"  # events, a folder for each kind of curves
        self.table = path / PAGE_FILE
        self.reward_model = path / REWARD_MODEL  # a link to the one that the run has trained
        self.report = path / REPORT  # tables and pictures of `alt-hpc report`
        self.curves = path / "curves.png"
        self.ends = {how: path / how for how in ("FINISHED", "STOPPED")}  # one sentence each
        self.lock = path / "lock"
        self.controller_lock = path / "controller.lock"
        self.report_lock = path / "report.lock"

    def user_file(self, name: str) -> tuple[Path, Path]:
        """The copy of a user's file that a config names, and what is known of the original."""
        folder = self.code / "user" / digest(name)[:8]
        return folder / Path(name).name, folder / "original.json"

    def packages(self, stage: str) -> Path:
        """Versions that the first task of a stage found."""
        return self.path / "packages" / f"{stage}.json"

    def frozen(self, name: str) -> tuple[Path, Path]:
        """Rows of text; how many they are, and their checksum, written last."""
        return self.data / f"{name}.jsonl", self.data / f"{name}.json"

    def draw(self, iteration: int) -> Path:
        """The prompts drawn, and how the iteration is cut into shards."""
        return self.iterations / f"{iteration:03d}" / "draw.json"

    def draws(self) -> list[int]:
        """The iterations that have begun."""
        return sorted(int(path.parent.name) for path in self.iterations.glob("*/draw.json"))

    def piece(self, piece: Piece) -> Path:
        return self.iterations / f"{piece.iteration:03d}" / piece.stage / f"{piece.shard:05d}"

    def manifest(self, piece: Piece) -> Path:
        return self.piece(piece) / MANIFEST_FILE

    def withdrawn(self, piece: Piece) -> list[Path]:
        """Manifests of it that no longer count."""
        return sorted(self.piece(piece).glob(WITHDRAWN.format("*")))

    def attempt(self, piece: Piece, number: int, again: int = 0) -> Path:
        """Slurm may start one attempt twice: `again` counts."""
        return self.piece(piece) / (f"attempt-{number}" + (f".{again}" if again else ""))

    def verdict(self, piece: Piece, number: int) -> Path:
        """What an attempt says of its own end."""
        return self.piece(piece) / f"verdict-{number}.json"

    def attempts(self, piece: Piece) -> list[Path]:
        return sorted(self.piece(piece).glob("attempt-*"))

    def kept(self, piece: Piece) -> list[Path]:
        return [file for attempt in self.attempts(piece) if (file := attempt / KEPT_FILE).exists()]

    def replies(self, piece: Piece) -> list[Path]:
        """What judges have said to the attempts at a piece."""
        files = [attempt / REPLIES_FILE for attempt in self.attempts(piece)]
        return [file for file in files if file.exists()]

    def spent(self, judge: str) -> Path:
        """What requests of a judge (the key where it stands) cost."""
        return self.path / "spent" / f"{judge}.jsonl"

    def rows(self, piece: Piece) -> str:
        """The rows that a piece is, within an attempt."""
        return f"{STAGES[piece.stage].rows}.jsonl"

    def trainings(self, piece: Piece) -> Path:
        return self.piece(piece) / "checkpoints"

    def training(self, piece: Piece, sources: str) -> Path:
        """Checkpoints and metrics of a training from sources of this digest."""
        return self.trainings(piece) / sources[:12]

    def steps(self, training: Path) -> Path:
        return training / "steps"

    def steps_saved(self, piece: Piece) -> list[int]:
        """The optimiser steps after which a whole checkpoint was saved."""
        found = self.trainings(piece).glob(f"*/steps/{STEPS}/{MANIFEST_FILE}")
        return [int(path.parent.name.removeprefix("step-")) for path in found]

    def job(self, iteration: int, stage: str, attempt: int) -> Path:
        """What one submission has of `jobs`."""
        return self.jobs / f"{iteration}-{stage}-{attempt}"

    def policy(self, iteration: int) -> Path:
        """A link to the exported checkpoint."""
        return self.path / "policies" / f"{iteration:03d}"


def task_log(folder: Path, element: str, rank: int) -> Path:
    """The log of one process of a job, where submitit puts it."""
    return folder / f"{element}_{rank}_log.out"

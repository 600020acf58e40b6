"""The checkpoints of one training: which are whole, and how many are kept."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from alt_hpc.run import files, layout
from alt_hpc.run.manifests import Whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Whole):
    """What says that a checkpoint is whole."""

    step: int


@dataclass
class Checkpoints:
    """Folders `step-NNNNNN`, each whole once its manifest is there: a `Store` of the training."""

    folder: Path

    def make(self) -> None:
        files.make_private(self.folder)  # DeepSpeed unpickles what it finds there

    def check(self) -> None:
        files.check_private(self.folder)

    def tag(self, step: int) -> str:
        return layout.step_name(step)

    def random_state(self, step: int, rank: int) -> Path:
        return layout.random_state(self.folder / self.tag(step), rank)

    def whole(self, identity: str) -> list[int]:
        """Steps of the checkpoints that are whole and this training's own, in order."""
        steps = []
        for place in sorted(self.folder.glob(layout.STEPS)):
            found = Checkpoint.read(place / layout.MANIFEST_FILE)
            if found is not None and found.has_sizes(place):
                if found.fingerprint == identity:
                    steps.append(found.step)
                else:
                    logger.warning("%s: of other settings, data or ranks: not used", place)
        return steps

    def begin(self, step: int) -> None:
        """Make room for a checkpoint; what an earlier attempt half wrote goes."""
        place = self.folder / self.tag(step)
        shutil.rmtree(place, ignore_errors=True)
        files.make_private(place)

    def commit(self, step: int, identity: str) -> None:
        """Declare a checkpoint whole, and remove what is older than the newest two."""
        place = self.folder / self.tag(step)
        sizes = {file.name: {"size": files.flushed_size(file)} for file in sorted(place.iterdir())}
        manifest = Checkpoint(step=step, fingerprint=identity, files=sizes)
        manifest.write(place / layout.MANIFEST_FILE)
        keep = {self.tag(kept) for kept in self.whole(identity)[-2:]}
        for other in self.folder.glob(layout.STEPS):
            if other.name not in keep:  # the manifest first: it is no longer whole
                (other / layout.MANIFEST_FILE).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)

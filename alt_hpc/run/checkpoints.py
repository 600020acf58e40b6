"""The checkpoints of one training: which are whole, and how many are kept."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from alt_hpc.run import files, layout
from alt_hpc.run.manifests import Whole

logger = logging.getLogger(__name__)

MOST_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Whole):
    """What says that a checkpoint is whole."""

    step: int


class Checkpoints:
    """Folders `step-NNNNNN`, each whole once its manifest (written last) is there.

    What the training loop stores in (`trainer.Store`). One process, the first rank, calls
    `make`, `whole`, `begin` and `commit`; `check`, `tag` and `random_state` serve every rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Make the folder, for our eyes alone: DeepSpeed unpickles what it finds there."""
        files.make_private(self.folder)

    def check(self) -> None:
        """Stop where it is not ours alone."""
        files.check_private(self.folder)

    def tag(self, step: int) -> str:
        """What DeepSpeed calls the checkpoint after a step: its folder's name."""
        return layout.step_name(step)

    def random_state(self, step: int, rank: int) -> Path:
        """Where a rank keeps the state of its random generators."""
        return layout.random_state(self._place(step), rank)

    def whole(self, identity: str) -> list[int]:
        """Steps of the checkpoints that are whole and this training's own, in order."""
        steps = []
        for place in sorted(self.folder.glob(layout.step_name("*"))):
            found = Checkpoint.read(place / layout.MANIFEST_FILE)
            if found is None or not found.has_sizes(place):
                continue
            if found.fingerprint != identity:
                logger.warning("%s: of other settings, data or ranks: not used", place)
                continue
            steps.append(found.step)
        return steps

    def begin(self, step: int) -> None:
        """Make room for a checkpoint; what an earlier attempt half wrote goes."""
        shutil.rmtree(self._place(step), ignore_errors=True)
        files.make_private(self._place(step))

    def commit(self, step: int, identity: str) -> None:
        """Declare a checkpoint whole, and remove what is older than the newest two."""
        place = self._place(step)
        sizes = {file.name: {"size": files.flushed_size(file)} for file in sorted(place.iterdir())}
        manifest = Checkpoint(step=step, fingerprint=identity, files=sizes)
        manifest.write(place / layout.MANIFEST_FILE)
        keep = {self.tag(kept) for kept in self.whole(identity)[-MOST_KEPT:]}
        for other in self.folder.glob(layout.step_name("*")):
            if other.name not in keep:  # the manifest first: it is no longer whole
                (other / layout.MANIFEST_FILE).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.folder / self.tag(step)

"""DeepSpeed's checkpoints of a training, and what it does not keep: random states, wholeness."""

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alt_hpc.training.ranks import Ranks

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Where a training's checkpoints are kept, a folder each, and which of them are whole.

    The first rank alone calls `make`, `whole`, `begin` and `commit`.
    """

    folder: Path

    def make(self) -> None: ...  # the folder, mode 0700: it holds pickles
    def check(self) -> None: ...  # raises InputError where the folder is not ours alone
    def tag(self, step: int) -> str: ...  # the checkpoint after a step, a folder in `folder`
    def random_state(self, step: int, rank: int) -> Path: ...  # its file for a rank's generators
    def whole(self, identity: str) -> list[int]: ...  # steps committed with this identity
    def begin(self, step: int) -> None: ...  # an empty folder for a checkpoint
    def commit(self, step: int, identity: str) -> None: ...  # all ranks have written: it is whole


@dataclass
class Checkpoints:
    """Saves and loads what a `Store` keeps; the same collectives in the same order everywhere.

    `identity` is what a checkpoint must have in common with the training that goes on from it.
    """

    store: Store
    identity: str
    engine: Any
    ranks: Ranks

    def resume(self) -> int:
        """Load the newest whole checkpoint, if any; the step after which it was saved, or 0."""
        store, first = self.store, self.ranks.first
        if first:
            store.make()
        torch.distributed.barrier()
        store.check()
        newest = max(store.whole(self.identity), default=0) if first else 0
        agreed = torch.tensor(newest, device=self.ranks.device)
        torch.distributed.broadcast(agreed, src=0)
        step = int(agreed)
        if not step:
            return 0
        if first:
            logger.warning("resuming after step %d from %s", step, store.folder)
        path, _ = self.engine.load_checkpoint(
            str(store.folder),
            tag=store.tag(step),
            load_module_strict=False,  # parameters not trained are not saved: they are as given
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise RuntimeError(f"{store.folder / store.tag(step)}: DeepSpeed cannot load it")
        text = store.random_state(step, self.ranks.rank).read_text(encoding="ascii")
        _set_random_state(json.loads(text))
        return step

    def save(self, step: int) -> None:
        """Save collectively; the first rank then says that it is whole."""
        store, first = self.store, self.ranks.first
        if first:
            store.begin(step)
        place, tag = str(store.folder), store.tag(step)
        # It begins and ends with a barrier.
        self.engine.save_checkpoint(place, tag, save_latest=False, exclude_frozen_parameters=True)
        mine = store.random_state(step, self.ranks.rank)
        mine.write_text(json.dumps(_random_state()), encoding="ascii")
        torch.distributed.barrier()
        if first:
            store.commit(step, self.identity)


def _random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as JSON values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])

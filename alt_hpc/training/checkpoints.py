"""DeepSpeed's checkpoints of a training, and what it does not keep: random states, wholeness."""

import json
import logging
import random
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alt_hpc.training.ranks import Ranks

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Checkpoints of a training on the shared file system, a folder each, and which are whole.

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


def resume(store: Store, identity: str, engine: Any, ranks: Ranks) -> int:
    """Load the newest whole checkpoint of this identity, if any; after which step, or 0."""
    if ranks.first:
        store.make()
    torch.distributed.barrier()
    store.check()
    newest = max(store.whole(identity), default=0) if ranks.first else 0
    agreed = torch.tensor(newest, device=ranks.device)
    torch.distributed.broadcast(agreed, src=0)
    if not (step := int(agreed)):
        return 0
    if ranks.first:
        logger.warning("resuming after step %d from %s", step, store.folder)
    path, _ = engine.load_checkpoint(
        str(store.folder),
        tag=store.tag(step),
        load_module_strict=False,  # parameters not trained are not saved: they are as given
        load_lr_scheduler_states=False,
    )
    if path is None:
        raise RuntimeError(f"{store.folder / store.tag(step)}: DeepSpeed cannot load it")
    state = json.loads(store.random_state(step, ranks.rank).read_text(encoding="ascii"))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])
    return step


def save(store: Store, step: int, identity: str, engine: Any, ranks: Ranks) -> None:
    """Save collectively; the first rank then says that it is whole."""
    if ranks.first:
        store.begin(step)
    place, tag = str(store.folder), store.tag(step)
    # It begins and ends with a barrier.
    engine.save_checkpoint(place, tag, save_latest=False, exclude_frozen_parameters=True)
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    text = json.dumps(state, default=lambda array: array.tolist())
    store.random_state(step, ranks.rank).write_text(text, encoding="ascii")
    torch.distributed.barrier()
    if ranks.first:
        store.commit(step, identity)

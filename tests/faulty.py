"""What fault tests run in place of a stage's interpreter: stages that break on purpose, once.

A wrapper script (see test_faults) calls `main` with the interpreter's own arguments. A fault is a
file `STAGE-ITERATION-SHARD` in $FAULTS whose text is the action; who meets it takes it away, so
that it happens once, unless the text begins with "always ". With $STUBS the stages are stubs:
the same files and the same promises, with arithmetic in place of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS, PAUSE_S = 6, 0.2


def main() -> None:
    """Run `[-u] -m MODULE ARGUMENTS...` with the faults in place."""
    arguments = [a for a in sys.argv[1:] if a != "-u"]
    assert arguments[0] == "-m"
    if os.environ.get("STUBS"):
        for name, stage in STUBS.items():
            sys.modules[f"alt_hpc.stages.{name}"] = SimpleNamespace(run=stage)  # type: ignore[assignment]
    elif list(Path(os.environ["FAULTS"]).glob("train-*")):
        _break_training()
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


def taken(name: str) -> str:
    """The action of a fault, taken away unless it happens always; empty: none."""
    path = Path(os.environ["FAULTS"], name)
    with contextlib.suppress(FileNotFoundError):
        action = path.read_text().strip()
        if not action.startswith("always "):
            path.rename(path.with_name(f".{name}-{time.time_ns()}"))
        return action.removeprefix("always ")
    return ""


def meet(name: str, place: str) -> None:
    """Do what the fault says, if it is for this place in the stage (`PLACE ACTION`)."""
    path = Path(os.environ["FAULTS"], name)
    if not path.exists() or place not in path.read_text().split():
        return
    action = taken(name)
    if action:
        print(f"fault: {name}: {action}", flush=True)
        ACTIONS[action.split()[-1]]()


def _remember() -> None:
    block = []
    while True:
        block.append(bytearray(50_000_000))
        time.sleep(0.2)


def _raise() -> None:
    raise ValueError("a fault on purpose")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "raise": _raise,
    "hang": lambda: time.sleep(3600),
    "memory": _remember,
    "slow": lambda: time.sleep(20),
    "wait": lambda: time.sleep(3),
}


# --- real training that breaks ----------------------------------------------------------------

HELD: list[socket.socket] = []


def _break_training() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from alt_hpc import models, ranks, trainer

    ports = ranks._ports

    def busy_ports(key: str) -> Iterator[int]:
        found = list(ports(key))
        if taken("ports"):
            HELD.extend(socket.create_server(("127.0.0.1", port)) for port in found[:2])
            Path(os.environ["FAULTS"], "held-ports").touch()
        yield from found

    ranks._ports = busy_ports
    step, write, save = trainer._Loop.step, trainer._Checkpoints._write_manifest, models.save_policy

    def broken_step(loop: Any, number: int, *rest: Any) -> Any:
        meet("train-1-0", f"step{number}-rank{loop.ranks.rank}")
        if Path(os.environ["FAULTS"], "slow-steps").exists():
            Path(os.environ["FAULTS"], f"at-{number}").touch()
            time.sleep(1)
        return step(loop, number, *rest)

    def broken_write(store: Any, target: Path, number: int) -> None:
        meet("train-1-0", f"checkpoint{number}")
        write(store, target, number)

    def broken_save(*arguments: Any) -> None:
        save(*arguments)
        meet("train-1-0", "export")

    trainer._Loop.step = broken_step  # type: ignore[method-assign]
    trainer._Checkpoints._write_manifest = broken_write  # type: ignore[method-assign]
    models.save_policy = broken_save


# --- stubs --------------------------------------------------------------------------------------


def _begin(folder: Any, piece: Any, attempt: int) -> tuple[dict[str, str], Any]:
    from alt_hpc import pieces

    name = f"{piece.stage}-{piece.iteration}-{piece.shard}"
    meet(name, "start")
    sources = folder.checksums(pieces.inputs(folder.config(), folder.shardings(), piece))
    return sources, folder.attempt(piece, attempt)


def _sample(folder: Any, piece: Any, attempt: int) -> None:
    from alt_hpc import data
    from alt_hpc.config import digest
    from alt_hpc.pieces import Piece

    k = piece.iteration
    sources, work = _begin(folder, piece, attempt)
    before = ""
    if k > 1:
        before = (folder.open_piece(Piece(k - 1, "train"))[0] / MODEL).read_text()
    start, end = folder.shardings()[k].sample[piece.shard]
    prompts = data.drawn_prompts(folder, k, start, end)
    starts = [*range(start, end, folder.config().sampling.group), end]

    def make(groups: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for group in groups:
            meet(f"sample-{k}-{piece.shard}", f"group{group}")
            time.sleep(PAUSE_S)
            yield [
                {"row": row, "prompt": prompts[row - start], "value": digest([k, row, before])}
                for row in range(starts[group], starts[group + 1])
            ]

    work.commit_rows(work.resumable(sources, starts, make, "samples"), inputs=sources)


def _score(folder: Any, piece: Any, attempt: int) -> None:
    from alt_hpc.config import digest
    from alt_hpc.pieces import Piece

    sources, work = _begin(folder, piece, attempt)
    samples = list(folder.rows(Piece(piece.iteration, "sample", piece.shard)))
    first = samples[0]["row"]

    def make(indices: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for index in indices:
            meet(f"score-{piece.iteration}-{piece.shard}", f"group{index}")
            time.sleep(PAUSE_S / 2)
            yield [{"row": samples[index]["row"], "value": digest(samples[index])}]

    starts = range(first, first + len(samples) + 1)
    work.commit_rows(work.resumable(sources, starts, make, "samples"), inputs=sources)


MODEL = "policy/model.safetensors"


def _train(folder: Any, piece: Any, attempt: int) -> None:
    from alt_hpc import interrupt
    from alt_hpc.config import digest

    k = piece.iteration
    sources, work = _begin(folder, piece, attempt)
    rows = [[list(folder.all_rows(k, stage))] for stage in ("sample", "score")]
    steps = folder.checkpoints(piece, sources) / "steps"
    done = max((int(p.parent.name[5:]) for p in steps.glob("*/manifest.json")), default=0)
    for step in range(done + 1, STEPS + 1):
        if interrupt.asked():
            raise interrupt.Interrupted("asked to stop")
        meet(f"train-{k}-0", f"step{step}")
        time.sleep(PAUSE_S)
        (steps / f"step-{step:06d}").mkdir(parents=True, mode=0o700)
        (steps / f"step-{step:06d}" / "manifest.json").write_text("{}")
        folder.show_progress(piece, step, STEPS, "steps", work.started)
    (work.folder / MODEL).parent.mkdir()
    (work.folder / MODEL).write_text(digest([k, rows]))
    meet(f"train-{k}-0", "export")
    work.commit([MODEL], rows=len(rows), inputs=sources)
    folder.remove_checkpoints(piece)
    folder.publish_policy(piece, (work.folder / MODEL).parent)


def _evaluate(folder: Any, piece: Any, attempt: int) -> None:
    sources, work = _begin(folder, piece, attempt)
    work.commit_rows([{"row": piece.shard}], inputs=sources)


def _report(folder: Any, piece: Any, attempt: int) -> None:
    sources, work = _begin(folder, piece, attempt)
    (work.folder / "report.json").write_text(json.dumps({"iteration": piece.iteration}))
    work.commit(["report.json"], rows=1, inputs=sources, facts={"report": {}})


STUBS = {
    "sample": _sample,
    "score": _score,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
}

if __name__ == "__main__":
    main()

"""What fault tests run in place of a stage's interpreter: stages that break on purpose, once.

A wrapper script (see test_faults) calls `main` with the interpreter's own arguments. A fault is a
file `STAGE-ITERATION-SHARD` in $FAULTS whose text is the action; who meets it takes it away, so
that it happens once, unless the text begins with "always ". With $STUBS the stages are stubs:
the same files and the same promises, with arithmetic in place of models.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
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
        from alt_hpc.graph import STAGES

        for name, stage in STAGES.items():
            stub = SimpleNamespace(run=STUBS.get(name, _one_row))
            sys.modules[f"alt_hpc.stages.{stage.key}"] = stub  # type: ignore[assignment]
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


def _wrong() -> None:
    from alt_hpc.errors import InputError

    raise InputError("posts.jsonl:3: a line on purpose")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "raise": _raise,
    "wrong": _wrong,
    "hang": lambda: time.sleep(3600),
    "memory": _remember,
    "slow": lambda: time.sleep(20),
    "wait": lambda: time.sleep(3),
}


# --- real training that breaks ----------------------------------------------------------------

HELD: list[socket.socket] = []


def _break_training() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from alt_hpc.lm import save as saving
    from alt_hpc.run.manifests import Checkpoints
    from alt_hpc.training import loop, ranks

    connect = ranks.connect

    def busy_port(me: Any) -> None:
        if me.first and taken("ports"):
            HELD.append(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
            Path(os.environ["FAULTS"], "held-ports").touch()
        connect(me)

    ranks.connect = busy_port
    step, commit, save = loop._Steps.take, Checkpoints.commit, saving.policy

    def broken_step(steps: Any, number: int, *rest: Any) -> Any:
        meet("train-1-0", f"step{number}-rank{steps.ranks.rank}")
        if Path(os.environ["FAULTS"], "slow-steps").exists():
            Path(os.environ["FAULTS"], f"at-{number}").touch()
            time.sleep(1)
        return step(steps, number, *rest)

    def broken_commit(store: Any, number: int, identity: str) -> None:
        meet("train-1-0", f"checkpoint{number}")
        commit(store, number, identity)

    def broken_save(*arguments: Any) -> None:
        save(*arguments)
        meet("train-1-0", "export")

    loop._Steps.take = broken_step  # type: ignore[method-assign]
    Checkpoints.commit = broken_commit  # type: ignore[method-assign]
    saving.policy = broken_save


# --- stubs --------------------------------------------------------------------------------------


def _start(work: Any) -> str:
    """The name of the piece's fault, which may be met here."""
    name = f"{work.piece.stage}-{work.piece.iteration}-{work.piece.shard}"
    meet(name, "start")
    return name


def _sample(work: Any) -> None:
    from alt_hpc.data import draws
    from alt_hpc.graph import Piece
    from alt_hpc.settings import digest

    k, name, before = work.piece.iteration, _start(work), ""
    if k > 1:
        before = (work.run.manifests.open(Piece(k - 1, "train"))[0] / MODEL).read_text()
    prompts = dict(zip(work.rows, draws.prompts(work.run, work.piece), strict=True))
    starts = [*work.rows[:: work.config.sample.group], work.rows.stop]

    def make(groups: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for group in groups:
            meet(name, f"group{group}")
            time.sleep(PAUSE_S)
            yield [
                {"row": row, "prompt": prompts[row], "value": digest([k, row, before])}
                for row in range(starts[group], starts[group + 1])
            ]

    work.attempt.commit_rows(work.attempt.resumable(starts, make, "samples"))


def _score(work: Any) -> None:
    from alt_hpc.settings import digest

    name, samples = _start(work), list(work.mates())

    def make(indices: Iterator[int]) -> Iterator[list[dict[str, Any]]]:
        for index in indices:
            meet(name, f"group{index}")
            time.sleep(PAUSE_S / 2)
            value = digest(samples[index])
            rated = {"rewards": [float(int(c, 16)) for c in value[:6]], "finished": [True] * 6}
            row = {"row": samples[index]["row"], "value": value, **rated, "post_shortened": False}
            yield [row]

    starts = range(work.rows.start, work.rows.stop + 1)
    work.attempt.commit_rows(work.attempt.resumable(starts, make, "samples"))


MODEL = "policy/model.safetensors"


def _train(work: Any) -> None:
    from alt_hpc import interrupt
    from alt_hpc.run import files, rows
    from alt_hpc.run.manifests import Checkpoints
    from alt_hpc.settings import digest

    k, name, layout = work.piece.iteration, _start(work), work.run.layout
    made = [[list(rows.of_stage(work.run, k, stage))] for stage in ("sample", "score")]
    store = Checkpoints(layout.steps(layout.training(work.piece, digest(work.sources))))
    store.make()
    for step in range(max(store.whole("stub"), default=0) + 1, STEPS + 1):
        if interrupt.asked():
            raise interrupt.Interrupted("asked to stop")
        meet(name, f"step{step}")
        time.sleep(PAUSE_S)
        store.begin(step)
        store.commit(step, "stub")
        work.show(step, STEPS, "steps", work.attempt.started)
    policy = work.attempt.folder / MODEL
    policy.parent.mkdir()
    policy.write_text(digest([k, made]))
    meet(name, "export")
    work.attempt.commit([MODEL], rows=len(made))
    shutil.rmtree(layout.trainings(work.piece))
    files.link(layout.policy(k), policy.parent)


def _one_row(work: Any) -> None:
    """Any other stage."""
    _start(work)
    report: dict[str, Any] = {"evaluation": {}, "policies": {}, "lines": [], "shortened": {}}
    work.attempt.commit_rows([{"row": work.piece.shard}], {"report": report})


STUBS = {"sample": _sample, "score": _score, "train": _train}

if __name__ == "__main__":
    main()

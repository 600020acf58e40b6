"""How far a run is: lines while it runs here, and `alt-hpc status` from anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from alt_hpc.clusters.cluster import NEVER, QueueUnknown
from alt_hpc.clusters.local import Element, Local
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.control import chain
from alt_hpc.control.step import looked, scripts
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.report import text
from alt_hpc.run import progress
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import task_log

EVERY_S = 5.0
DEAD_LOOKS = 3  # in a row without a controller in the queue: the run goes on no more


class Screen:
    """Prints a line per running stage every few seconds, and one when a stage ends."""

    def __init__(self, folder: RunFolder, local: Local) -> None:
        self.folder = folder
        self.local = local
        self.shown = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self.shown < EVERY_S:
            return
        self.shown = time.monotonic()
        running = {(e.task.iteration, e.task.stage) for e in self.local.running()}
        for iteration, stage in sorted(running):
            print(line(self.folder, iteration, stage), flush=True)

    def tell(self, ended: Iterable[Element]) -> None:
        """Tell of elements that failed, and of stages that are whole now."""
        for element in ended:
            task = element.task
            name = f"{task.stage} {task.iteration}"
            pieces = self.folder.graph().of(task.iteration, task.stage)
            if element.state == "FAILED":
                log = task_log(element.request.folder, element.id, 0)
                print(f"{name}: task {element.index} failed; see {log}", file=sys.stderr)
            elif all(self.folder.manifests.get(piece) for piece in pieces):
                print(f"{name}: done", flush=True)


def line(folder: RunFolder, iteration: int, stage: str, silent: str = "starting") -> str:
    """`sample 1   shards 1/2   37/48 prompts   2.1 prompts/s   about 0:05 left`."""
    pieces = folder.graph().of(iteration, stage)
    count = len(pieces)
    whole = sum(folder.manifests.get(piece) is not None for piece in pieces)
    words = f"{stage} {iteration}".ljust(16) + f"shards {whole}/{count}".ljust(16)
    found = [told for piece in pieces if (told := progress.read(folder, piece))]
    if not found:
        return words + ("whole" if whole == count else silent)
    done, total = sum(p["done"] for p in found), sum(p["total"] for p in found)
    spent = max(p["at"] for p in found) - min(p["started"] for p in found)
    rate = done / spent if spent > 0 and done else 0.0
    total = round(total * count / len(found))
    words += f"{done}/{total} {found[0]['unit']}".ljust(22)
    if not rate:
        return words
    left = max(0, round((total - done) / rate))
    return (
        words
        + f"{rate:.2f} {found[0]['unit']}/s".ljust(20)
        + f"about {left // 60}:{left % 60:02d} left"
    )


def status(folder: RunFolder) -> str:
    """Every stage of every iteration begun, and how the run ended if it has."""
    lines = [f"run {folder.path}"]
    graph = folder.graph()
    for k in graph.shardings:
        for stage in graph.stages(k):
            lines.append(line(folder, k, stage, "not started"))
            lines += [f"  {lag}" for lag in progress.laggards(folder, k, stage)]
    lines += [f"{piece}: {why}" for piece, why in _final(folder).items()]
    ended = folder.ended()
    lines.append(f"{ended[0]}: {ended[1]}" if ended else _going(folder))
    return "\n".join(lines)


def _final(folder: RunFolder) -> dict[Piece, str]:
    """What is not tried again since a person last submitted, and why."""
    submissions, counted_from = folder.journal.submissions()
    keys = {submission.key for submission in submissions[counted_from:]}
    ends = folder.journal.outcomes()
    return {piece: e.sentence for (key, piece), e in ends.items() if key in keys and e.sentence}


LOCAL_DEAD = "nothing runs it here: run the same command again to go on"
SLURM_DEAD = "no controller is in the queue: submit again to go on"


def _going(folder: RunFolder) -> str:
    """Whether a process here, or anything in the queue, will bring the run on."""
    if folder.config().cluster.backend == "local":
        return "goes on" if folder.in_use() else LOCAL_DEAD
    if not available():
        return "not known whether it goes on (Slurm's commands are not on PATH)"
    slurm = Slurm()
    try:
        chain.check_cluster(folder, slurm)
        queued = slurm.controllers(scripts(folder))
        elements = looked(folder, slurm)
    except (QueueUnknown, InputError) as error:
        return f"not known whether it goes on ({error})"
    held = chain.held(elements)
    if held:
        return f"held by Slurm: scontrol release {' '.join(held)}"
    words = [
        f"{element.id} can never start: {NEVER[element.reason]} ({element.reason})"
        for _, element in elements
        if element.never
    ]
    if queued:
        return "\n".join([*words, f"goes on (controller {', '.join(queued)})"])
    if elements:
        left = ", ".join(dict.fromkeys(element.id.partition("_")[0] for _, element in elements))
        words.append(f"jobs of it are in the queue still ({left})")
    return "\n".join([*words, SLURM_DEAD])


def follow(folder: RunFolder) -> int:
    """Show a run's progress until it ends, then its summary; returns the exit status."""
    shown, dead = "", 0
    while folder.ended() is None and dead < DEAD_LOOKS:
        now = status(RunFolder(folder.path))  # a new one: controllers begin iterations meanwhile
        if now != shown:
            print(now + "\n", flush=True)
        shown = now
        dead = dead + 1 if now.endswith(SLURM_DEAD) else 0
        time.sleep(EVERY_S)
    print(text.summary(RunFolder(folder.path)))
    how, sentence = folder.ended() or ("STOPPED", SLURM_DEAD)
    if how == "FINISHED":
        return 0
    print(sentence, file=sys.stderr)
    return 1

"""How far a run is: lines while it runs here, and `alt-hpc status` from anywhere."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from alt_hpc.clusters.cluster import ENDED, NEVER, QueueUnknown
from alt_hpc.clusters.local import Element, Local
from alt_hpc.clusters.slurm import Slurm, available
from alt_hpc.control import chain, share
from alt_hpc.control.step import looked, scripts
from alt_hpc.errors import InputError
from alt_hpc.graph import TRAIN
from alt_hpc.plan import NO_NODES_FAULT, UNBEGUN
from alt_hpc.report import results
from alt_hpc.run import attempt
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import task_log

EVERY_S = 5.0
NOT_BY_ITSELF = (UNBEGUN, *NO_NODES_FAULT)  # ends that say nothing of the piece
DEAD_LOOKS = 3  # in a row without a controller in the queue: the run goes on no more
LOCAL_DEAD = "nothing runs it here: run the same command again to go on"
SLURM_DEAD = "no controller is in the queue: submit again to go on"


@dataclass
class Screen:
    """Prints a line per running stage every few seconds, and one when a stage ends."""

    folder: RunFolder
    local: Local
    shown: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        if time.monotonic() - self.shown >= EVERY_S:
            self.shown = time.monotonic()
            for iteration, stage in sorted(_stages(self.local.running())):
                print(line(self.folder, iteration, stage), flush=True)

    def tell(self, ended: Iterable[Element]) -> None:
        """Tell of elements that failed, and of stages that are whole now."""
        for e in (e for e in ended if e.state == "FAILED"):
            log = task_log(e.request.folder, e.id, 0)
            words = f"{e.task.stage} {e.task.iteration}: task {e.index} failed"
            print(f"{words}{_last_words(log)}; see {log}", file=sys.stderr)
        going = _stages(e for e in self.local.elements if e.state not in ENDED)
        for iteration, stage in sorted(_stages(ended) - going):
            if all(map(self.folder.manifests.get, self.folder.graph().of(iteration, stage))):
                print(f"{stage} {iteration}: done", flush=True)


def _last_words(log: Path) -> str:
    """What the last line of a task's log says, in brackets: a traceback ends with its reason."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({textwrap.shorten(last, 120, placeholder=' …')})" if last else ""
    return ""


def _stages(elements: Iterable[Element]) -> set[tuple[int, str]]:
    return {(e.task.iteration, e.task.stage) for e in elements}


def line(folder: RunFolder, iteration: int, stage: str, silent: str = "starting") -> str:
    """`sample 1   shards 1/2   37/48 prompts   2.1 prompts/s   about 0:05 left` (whole: `took`)."""
    pieces = folder.graph().of(iteration, stage)
    left = [piece for piece in pieces if folder.manifests.get(piece) is None]
    count, whole = len(pieces), len(pieces) - len(left)
    words = f"{stage} {iteration}".ljust(16) + f"shards {whole}/{count}".ljust(16)
    said = {piece: told for piece in pieces if (told := attempt.shown(folder, piece))}
    found, silence = list(said.values()), len([piece for piece in left if piece not in said])
    if not found:
        return words + ("whole" if whole == count else silent)
    unit, done = found[0]["unit"], sum(p["done"] for p in found)
    now, spent = sum(p["done"] - p.get("kept", 0) for p in found), _spent(found)
    total = round(sum(p["total"] for p in found) * (1 + silence / len(found)))
    words += f"{done}/{total} {unit}".ljust(22)
    if spent <= 0 or now <= 0:
        return words
    words += f"{now / spent:.2f} {unit}/s".ljust(20)
    if whole == count:
        return f"{words}took {_clock(spent)}"
    return f"{words}about {_clock((total - done) * spent / now)} left"


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _spent(found: Iterable[dict[str, Any]]) -> float:
    """Seconds in which any of these pieces was being made: not while the run lay still."""
    spent, end = 0.0, 0.0
    for piece in sorted(found, key=itemgetter("started")):
        spent += max(0.0, piece["at"] - max(piece["started"], end))
        end = max(end, piece["at"])
    return spent


def status(folder: RunFolder) -> str:
    """Every stage of every iteration begun, and how the run ended or goes on."""
    lines, graph = [f"run {folder.path}"], folder.graph()
    if share.waits(folder):
        lines.append(f"waits for what {folder.config().start_from} makes of their start")
    for k in graph.shardings:
        for stage in graph.stages(k):
            lines.append(line(folder, k, stage, "not started"))
            lines += [f"  {lag}" for lag in attempt.laggards(folder, k, stage)]
    submissions, counted_from = folder.journal.submissions()
    keys = {submission.key for submission in submissions[counted_from:]}
    ends = folder.journal.outcomes().items()
    whys = {
        piece: end.sentence or str(end)
        for (key, piece), end in ends
        if key in keys and (end.sentence or end.state not in NOT_BY_ITSELF)
    }
    lines += [f"{piece}: {why}" for piece, why in whys.items() if not folder.manifests.get(piece)]
    ended = folder.ended()
    return "\n".join([*lines, ": ".join(ended) if ended else _going(folder)])


def together(folders: Sequence[RunFolder]) -> str:
    """A line a run: how far it is, the stages going on, how it ended or goes on."""
    cells = [_cells(folder) for folder in folders]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [map(str.ljust, row, widths) for row in cells]
    return "\n".join("   ".join(line).rstrip() for line in lines)


def _cells(folder: RunFolder) -> tuple[str, str, str, str]:
    graph, ended = folder.graph(), folder.ended()
    last, now = folder.config().iterations, list[str]()
    trained = sum(
        bool(folder.manifests.get(p)) for k in graph.shardings for p in graph.of(k, TRAIN)
    )
    for k in graph.shardings if not ended else ():
        for stage in graph.stages(k):
            about = line(folder, k, stage, "").split()
            whole, _, count = about[3].partition("/")
            if len(about) > 4 and whole != count:
                now.append(f"{stage} {k} {about[4]} {about[5]}")
    if share.waits(folder) and not ended:
        now.append(f"waits for {folder.config().start_from}")
    how = ": ".join(ended) if ended else _going(folder).replace("\n", "; ")
    return str(folder.path), f"iteration {trained} of {last} trained", ", ".join(now) or "-", how


def _going(folder: RunFolder) -> str:
    """Whether a process here, or anything in the queue, will bring the run on."""
    if folder.config().cluster.backend == "local":
        return "goes on" if folder.in_use() else LOCAL_DEAD
    if not available():
        return "not known whether it goes on (Slurm's commands are not on PATH)"
    slurm = Slurm()
    try:
        chain.check_cluster(folder, slurm)
        queued, elements = slurm.controllers(scripts(folder)), looked(folder, slurm)
    except (QueueUnknown, InputError) as error:
        return f"not known whether it goes on ({error})"
    pending = [e for e in elements.values() if e.state == "PENDING"]
    if held := [e.id for e in pending if "held" in e.reason.lower()]:
        return f"held by Slurm: scontrol release {' '.join(held)}"
    never = [e for e in pending if e.never]
    words = [f"{e.id} can never start: {NEVER[e.reason]} ({e.reason})" for e in never]
    if queued:
        return "\n".join([*words, f"goes on (controller {', '.join(queued)})"])
    jobs = ", ".join(dict.fromkeys(element.partition("_")[0] for element in elements))
    words += [f"jobs of it are in the queue still ({jobs})"] if jobs else []
    return "\n".join([*words, SLURM_DEAD])


def follow(*folders: RunFolder) -> int:
    """Show the progress of runs until they end, then their summaries; returns the exit status."""
    shown, dead = "", 0
    while (left := [one for one in folders if one.ended() is None]) and dead < DEAD_LOOKS:
        fresh = [RunFolder(one.path) for one in folders]  # controllers begin iterations meanwhile
        now = together(fresh) if len(fresh) > 1 else status(fresh[0])
        if now != shown:
            print(now + "\n", flush=True)
        shown = now
        dead = dead + 1 if now.count(SLURM_DEAD) == len(left) else 0
        time.sleep(EVERY_S)
    worst = 0
    for folder in folders:
        if len(folders) > 1:
            print(f"run {folder.path}")
        print(results.last_words(RunFolder(folder.path)))
        how, sentence = folder.ended() or ("STOPPED", SLURM_DEAD)
        if how == "STOPPED":
            print(sentence, file=sys.stderr)
            worst = 1
    return worst

"""What Slurm's clients say: asked by id, in an environment without filters, and read with care.

A site may greet on stdout, print notices or bytes that are no UTF-8, set SQUEUE_* in everyone's
profile, hide partitions or drop comments. So jobs are known by their ids and by the script that
they run, which lies in the run's folder, and by nothing else.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from alt_hpc import process
from alt_hpc.clusters.cluster import QueueUnknown, Seen

CLIENT_TIMEOUT_S = 60  # Slurm's clients retry for long when slurmctld is away
PATIENCE_S = (2.0, 5.0, 15.0, 30.0, 60.0)  # between the tries of one question, in a controller
ERROR = re.compile(r"^(\w+: )?(fatal|error|slurm_\w+ error):", re.IGNORECASE | re.MULTILINE)
Done = subprocess.CompletedProcess[str]


class UnknownJob(QueueUnknown):
    """Slurm answers that it knows no job of this id."""


def client(*command: str, patience: Sequence[float] = ()) -> str:
    """What a client of Slurm prints on stdout; asked again after each wait of `patience`.

    UnknownJob where there is no such job (any more); QueueUnknown where it failed, took too long,
    or printed an error though its exit status is 0.
    """
    try:
        done = call(command)
        if done.returncode == 0 and not ERROR.search(done.stderr):
            return done.stdout
        words = telling(done.stderr) or telling(done.stdout) or f"exit status {done.returncode}"
        kind = UnknownJob if "invalid job id" in words.lower() else QueueUnknown
        raise kind(f"{command[0]}: {words}")
    except QueueUnknown as error:
        if not patience or isinstance(error, UnknownJob):
            raise
        print(f"{error}; asking again in {patience[0]:g} s", file=sys.stderr, flush=True)
    time.sleep(patience[0])
    return client(*command, patience=patience[1:])


def call(command: Sequence[str], decided: Collection[str] = (), text: str = "") -> Done:
    """What a client of Slurm did; bytes that are no UTF-8 are replaced.

    `text` is its stdin, `decided` what the config decides. QueueUnknown where it gives no answer.
    """
    about: dict[str, Any] = {"env": process.for_slurm(decided), "timeout": CLIENT_TIMEOUT_S}
    about |= {"encoding": "utf-8", "errors": "replace"}
    try:
        return subprocess.run(command, input=text, capture_output=True, **about)
    except subprocess.TimeoutExpired as error:
        raise QueueUnknown(f"{command[0]}: no answer within {CLIENT_TIMEOUT_S} s") from error
    except OSError as error:
        raise QueueUnknown(f"{command[0]}: {error.strerror}") from error


def telling(text: str) -> str:
    """The line of a client's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = ("error", "unrecognized", "invalid")
    told = [line for line in lines if any(word in line.lower() for word in words)] or lines
    return told[0].removeprefix("sbatch: ").removeprefix("error: ") if told else ""


def show(job: str, folder: Path, patience: Sequence[float] = ()) -> dict[int, Seen]:
    """The elements of a job whose script lies in `folder`, by their index; a plain job is one.

    Empty where Slurm knows no such job, or gave its id to a job of somebody else since.
    """
    try:
        text = client("scontrol", "--all", "show", "job", job, patience=patience)
    except UnknownJob:
        return {}
    found: dict[int, Seen] = {}
    for block in text.split("\n\n"):
        facts = dict(re.findall(r"(\w+)=(\S+)", block))
        script = re.search(r"^ *Command=(.+)$", block, re.MULTILINE)
        if "JobState" not in facts or script is None or not _within(script[1], folder):
            continue
        ids = {0: facts["JobId"]}
        if "ArrayTaskId" in facts:  # such as 0-3,7%2
            indices = map(int, _numbers(facts["ArrayTaskId"].partition("%")[0]))
            ids = {index: f"{facts['ArrayJobId']}_{index}" for index in indices}
        nodes = hostnames(facts.get("NodeList", ""))
        now = facts["JobState"], nodes, facts.get("Reason", "")
        found |= {index: Seen(name, *now) for index, name in ids.items()}
    return found


def mine(folder: Path | None = None, patience: Sequence[float] = ()) -> dict[str, str]:
    """My jobs that have not ended, in partitions hidden or not: id -> state.

    Of a folder: those whose script lies there. Started elements of an array have ids of their own.
    """
    command = ("squeue", "--noheader", "--all", f"--user={os.getuid()}", "--format=%A|%T|%o")
    text = client(*command, patience=patience)
    rows = re.findall(r"(?m)^ *(\d+) *\|([^|\n]*)\| *(.*?) *$", text)
    return {job: state for job, state, script in rows if not folder or _within(script, folder)}


def _within(script: str, folder: Path) -> bool:
    """Whether it lies there, by whatever name Slurm was told of the folder."""
    place = Path(script).parent
    try:
        return place == folder or place.samefile(folder)
    except OSError:
        return False


def hostnames(listed: str) -> tuple[str, ...]:
    """`n[1-2],n4` as names, in order; none for `(null)`. As `scontrol show hostnames` has them."""
    names: list[str] = []
    if not listed.startswith("("):
        for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listed):  # at commas outside brackets
            texts = re.split(r"\[(.*?)\]", part)  # every other one stood in brackets
            choices = [_numbers(t) if i % 2 else [t] for i, t in enumerate(texts)]
            names += map("".join, itertools.product(*choices))
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    """The numbers of `0-3,07`, each as wide as its range has it."""
    found = []
    for first, _, last in (part.partition("-") for part in ranges.split(",")):
        if first.isdigit():
            found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found

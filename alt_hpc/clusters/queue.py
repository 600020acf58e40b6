"""What Slurm's clients say: asked by id, in an environment without filters, and read with care.

A site may greet on stdout, print notices or bytes that are no UTF-8, set SQUEUE_* in everyone's
profile, hide partitions or drop comments. So jobs are known by their ids and by the script that
they run, which lies in the run's folder, and by nothing else.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alt_hpc import process
from alt_hpc.clusters.cluster import QueueUnknown, Seen

CLIENT_TIMEOUT_S = 60  # Slurm's clients retry for long when slurmctld is away
PATIENCE_S = (2.0, 5.0, 15.0, 30.0, 60.0)  # between the tries of one question, in a controller
ERROR = re.compile(r"^(\w+: )?(fatal|error|slurm_\w+ error):", re.IGNORECASE | re.MULTILINE)
JOB_ID = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?$", re.MULTILINE)


class UnknownJob(QueueUnknown):
    """Slurm answers that it knows no job of this id."""


def client(*command: str, patience: Sequence[float] = ()) -> str:
    """What a client of Slurm prints on stdout; asked again after each wait of `patience`.

    UnknownJob where there is no such job (any more); QueueUnknown where it failed, took too long,
    or printed an error though its exit status is 0.
    """
    for wait in patience:
        try:
            return _ask(command)
        except UnknownJob:
            raise
        except QueueUnknown as error:
            print(f"{error}; asking again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    return _ask(command)


def _ask(command: Sequence[str]) -> str:
    status, out, err = call(command)
    if status == 0 and not ERROR.search(err):
        return out
    words = telling(err) or telling(out) or f"exit status {status}"
    kind = UnknownJob if "invalid job id" in words.lower() else QueueUnknown
    raise kind(f"{command[0]}: {words}")


def call(
    command: Sequence[str], decided: Collection[str] = (), text: str = ""
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a client; bytes that are no UTF-8 are replaced.

    `text` is its stdin; `decided` are the options of sbatch that the config decides. QueueUnknown
    where it cannot be started, or takes too long.
    """
    about: dict[str, Any] = {"env": process.for_slurm(decided), "timeout": CLIENT_TIMEOUT_S}
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, **about)
    except subprocess.TimeoutExpired as error:
        raise QueueUnknown(f"{command[0]}: no answer within {CLIENT_TIMEOUT_S} s") from error
    except OSError as error:
        raise QueueUnknown(f"{command[0]}: {error.strerror}") from error
    out, err = (said.decode("utf-8", "replace") for said in (done.stdout, done.stderr))
    return done.returncode, out, err


def job_id(out: str) -> str | None:
    """The id in an answer of `sbatch --parsable`, whatever is printed around it."""
    return next(reversed(JOB_ID.findall(out)), None)


def telling(text: str) -> str:
    """The line of a client's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = ("error", "unrecognized", "invalid")
    told = [line for line in lines if any(word in line.lower() for word in words)] or lines
    return told[0].removeprefix("sbatch: ").removeprefix("error: ") if told else ""


class Job(NamedTuple):
    """A job in Slurm's memory, as far as `squeue` lists it."""

    id: str
    state: str
    script: Path


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
        if "JobState" not in facts or script is None or not _within(Path(script[1]), folder):
            continue
        ids = {0: facts["JobId"]}
        if "ArrayTaskId" in facts:  # such as 0-3,7%2
            indices = map(int, _numbers(facts["ArrayTaskId"].partition("%")[0]))
            ids = {index: f"{facts['ArrayJobId']}_{index}" for index in indices}
        nodes = hostnames(facts.get("NodeList", ""))
        for index, name in ids.items():
            found[index] = Seen(name, facts["JobState"], nodes, facts.get("Reason", ""))
    return found


def mine(patience: Sequence[float] = ()) -> list[Job]:
    """My jobs that have not ended, an array once or more, in partitions hidden or not."""
    command = ("squeue", "--noheader", "--all", f"--user={os.getuid()}", "--format=%A|%T|%o")
    rows = [line.split("|", 2) for line in client(*command, patience=patience).splitlines()]
    rows = [row for row in rows if len(row) == 3 and row[0].strip().isdigit()]
    return [Job(job.strip(), state, Path(script.strip())) for job, state, script in rows]


def running_from(folder: Path, jobs: Iterable[Job]) -> list[Job]:
    """Those whose script lies in a folder, by whatever name they were told of it."""
    return [job for job in jobs if _within(job.script, folder)]


def _within(script: Path, folder: Path) -> bool:
    try:
        return script.parent == folder or script.parent.samefile(folder)
    except OSError:
        return False


def hostnames(listed: str) -> tuple[str, ...]:
    """`n[1-2],n4` as names, in order; none for `(null)`. As `scontrol show hostnames` has them."""
    if not listed or listed.startswith("("):
        return ()
    parts = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listed)  # at commas outside brackets
    return tuple(name for part in parts for name in _expanded(part))


def _expanded(part: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, after = rest.partition("]")
    return [f"{before}{n}{tail}" for n in _numbers(ranges) for tail in _expanded(after)]


def _numbers(ranges: str) -> list[str]:
    """The numbers of `0-3,07`, each as wide as its range has it."""
    found = []
    for first, _, last in (part.partition("-") for part in ranges.split(",")):
        if first.isdigit():
            found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found

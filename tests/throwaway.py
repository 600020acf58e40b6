"""Throw-away Slurm clusters for tests: slurm/devcluster on ports that nobody uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "slurm" / "devcluster")
SEEN = {str(ROOT), sys.prefix, sys.base_prefix}  # jobs run this checkout and this Python


def start(place: Path, *options: str) -> tuple[str, str]:
    """Start a cluster; returns the environment variable that names it, and its value."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 17600 + 1000 * worker  # two workers never try one port at the same moment
    for port in range(first, first + 1000, 20):  # others' clusters, or one of a killed test
        command = [SCRIPT, "start", "--dir", str(place), "--port", str(port), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if "try another --port" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    name, _, value = done.stdout.strip().removeprefix("export ").partition("=")
    return name, value.strip("'\"")


def stop(place: Path) -> None:
    """Stop it and remove its folder."""
    subprocess.run([SCRIPT, "stop", "--dir", str(place)], timeout=120, capture_output=True)
    shutil.rmtree(place, ignore_errors=True)


def start_hosts(place: Path, *options: str) -> dict[str, str]:
    """Start a cluster of hosts of their own; returns the variables that lead to it.

    They see what tests and jobs read, also where that lies in /tmp. An ordinary user cannot have
    such hosts: visibly skipped, a failure in CI.
    """
    seen = [option for folder in SEEN for option in ("--shared", folder)]
    command = [SCRIPT, "start", "--hosts", "--dir", str(place), *seen, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "--hosts needs root" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^export (\w+)=(.*)$", done.stdout, re.MULTILINE)
    return {name: os.path.expandvars(value.replace('"', "")) for name, value in found}

"""Throw-away Slurm clusters for tests: slurm/devcluster on ports that nobody uses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SCRIPT = str(Path(__file__).resolve().parent.parent / "slurm" / "devcluster")


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

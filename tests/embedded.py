"""The model that the tests and benchmarks use where they need a real one."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(os.environ.get("ALT_HPC_CACHE") or Path.home() / ".cache" / "alt_hpc")


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct that tests/run.sh and the quickstart make."""
    place = Path(os.environ.get("ALT_HPC_SMOLLM2") or CACHE / "SmolLM2-135M-Instruct")
    assert place.is_dir(), f"{place}: no such model: `bash tests/run.sh` makes it"
    return place

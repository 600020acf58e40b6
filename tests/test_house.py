"""The house: what stands where, who may import whom, and that a stage is one file and one row."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alt_hpc.graph import STAGES
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submitted

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alt_hpc"


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module, its docstrings apart, with its line."""
    tree = ast.parse(file.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def found(pattern: str, but: str) -> list[str]:
    """Where a string of the package matches, one module apart."""
    modules = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / but]
    return [
        f"{file.relative_to(ROOT)}:{line}: {text!r}"
        for file in modules
        for line, text in words(file)
        if re.search(pattern, text)
    ]


# ---------------------------------------------------------------------- what stands where


def test_only_process_reads_the_variables_of_a_job() -> None:
    assert found(r"\bS(LURM|LURMD|BATCH|RUN)_", "process.py") == []


def test_only_the_layout_knows_names_below_a_run() -> None:
    """What it names stands as a string nowhere else: no path can be built beside it."""
    texts = {text for _, text in words(PACKAGE / "run/layout.py")}
    names = {text for text in texts if re.fullmatch(r"(?=.*\w{3})(?=.+[.-])[\w.*-]+", text)}
    names -= {"config.json"}  # every model's folder has one too
    assert {"manifest.json", "journal.jsonl", "attempt-", "meeting-", "controller.sh"} <= names
    spelt = "|".join(re.escape(name) for name in names)
    assert found(rf"^/?({spelt})", "run/layout.py") == []
    assert (
        found(r"(iterations|policies|checkpoints|steps|jobs|tensorboard)/", "run/layout.py") == []
    )


def test_only_the_graph_spells_out_which_stages_there_are() -> None:
    """Other modules name a stage by the graph's constant; `train` is also a split's name."""
    names = "|".join(name for name in STAGES if name != "train")
    left = [place for place in found(rf"^({names})$", "graph.py") if "config.py" not in place]
    commands_and_keys = ("__main__.py", "summary.py", "stages/report.py", "reward.py")
    assert [place for place in left if not any(file in place for file in commands_and_keys)] == []


@pytest.mark.parametrize("module", ["controller", "preview", "graph", "plan", "stages.work"])
def test_what_plans_and_starts_imports_no_torch(module: str) -> None:
    code = f"import sys, alt_hpc.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---------------------------------------------------------------------- who may import whom


PLANTED = {  # module -> an import against the arrows
    "graph.py": "import alt_hpc.plan",
    "plan.py": "from alt_hpc.run import files",
    "trainer.py": "from alt_hpc.run.folder import RunFolder",
    "models.py": "def later() -> None:\n    import alt_hpc.trainer",
    "stages/sample.py": "import alt_hpc.clusters.slurm",
    "stages/score.py": "from alt_hpc.stages import sample",
    "run/layout.py": "from alt_hpc.run import folder",
    "errors.py": "from alt_hpc import config",
    "process.py": "from alt_hpc import task",
    "strange.py": "",  # a module in no layer
}


def _package(place: Path) -> Path:
    """A copy of the package, to be changed."""
    shutil.copytree(PACKAGE, place / "alt_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", place)
    return place / "alt_hpc"


def _contract(place: Path) -> subprocess.CompletedProcess[str]:
    lint = Path(sys.executable).with_name("lint-imports")
    command = [str(lint), "setup.cfg", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(place)}
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("module", PLANTED)
def test_an_import_against_the_arrows_is_found(tmp_path: Path, module: str) -> None:
    package = _package(tmp_path)
    with (package / module).open("a") as file:
        file.write(f"\n{PLANTED[module]}\n")
    done = _contract(tmp_path)
    assert done.returncode != 0
    assert Path(module).stem in done.stdout


# ---------------------------------------------------------------------- a new stage


NEW_STAGE = '''"""lengths: how long the held-out answers of an iteration are."""

from alt_hpc.graph import EVALUATE
from alt_hpc.run import rows
from alt_hpc.stages.work import Work


def run(work: Work) -> None:
    """One row a post and variant."""
    found = rows.of_stage(work.run, work.piece.iteration, EVALUATE)
    work.attempt.commit_rows([{"row": row["row"], "length": row["length"]} for row in found])
'''
NEW_ROW = '        Stage("lengths", (every(EVALUATE),), made=always, rows="lengths"),\n    )\n}\n'


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_new_stage_is_one_file_and_one_row(
    request: pytest.FixtureRequest, tiny_config: Path, tmp_path: Path, backend: str
) -> None:
    if backend == "slurm":
        request.getfixturevalue("slurm")
    package = _package(tmp_path)
    graph = (package / "graph.py").read_text()
    assert graph.count("    )\n}\n") == 1
    (package / "graph.py").write_text(graph.replace("    )\n}\n", NEW_ROW))
    (package / "stages/lengths.py").write_text(NEW_STAGE)
    assert _contract(tmp_path).returncode == 0
    place = tmp_path / "run"
    chosen = [
        f"run={place}",
        "iterations=1",
        f"cluster.backend={backend}",
        "cluster.lengths.cpus=2",
    ]
    chosen += ["cluster.train.nodes=1", "cluster.evaluate.shards=2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def alt_hpc(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alt_hpc", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    settings = [word for value in chosen for word in ("--set", value)]
    assert "run-lengths-1" in alt_hpc("plan", str(tiny_config), *settings)
    start = ["run"] if backend == "local" else ["submit", "--wait"]
    alt_hpc(*start, str(tiny_config), *settings)
    keys = [entry.key for entry in RunFolder(place).journal.of(Submitted)]
    assert {"0:lengths:1", "1:lengths:1"} <= set(keys)
    for k in (0, 1):
        (file,) = place.glob(f"iterations/00{k}/lengths/00000/attempt-1/lengths.jsonl")
        assert len(file.read_text().splitlines()) == (18 if k == 0 else 12)
    status = alt_hpc("status", str(place))
    assert re.search(r"lengths 1 +shards 1/1 +whole", status)
    assert "lengths 1 shard 0: whole already" in alt_hpc(
        "stage", "lengths", str(place), "--iteration", "1"
    )

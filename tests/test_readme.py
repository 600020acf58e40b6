"""What README shows as examples is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_house import _package

from alt_hpc import config as configs
from alt_hpc.control import start
from alt_hpc.methods import METHODS
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder

README = (Path(__file__).parent.parent / "README.md").read_text()


def example(name: str) -> str:
    """The block of README whose first line is this name."""
    (found,) = re.findall(rf"```\w+\n# {re.escape(name)}\n(.*?)```", README, re.DOTALL)
    return str(found)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_place: Path) -> Path:
    """A folder with the examples' files, and data with a further column."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(example("my_rewards.py"))
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = (tiny_place / "data" / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"words": i} for i, line in enumerate(lines)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["my_reward.yaml", "my_total.yaml"])
def test_a_reward_of_your_own(name: str, place: Path, tiny_place: Path, tiny_config: Path) -> None:
    text = example(name).replace("path/to/a/reward-model", f"{tiny_place}/reward")
    reward = yaml.safe_load(text)["reward"]
    chosen = [f"run={place}/run", "data.prompts.path=data", f"reward={json.dumps(reward)}"]
    chosen += ["iterations=1", "cluster.train={}"]
    assert start.run(configs.load(tiny_config, chosen)) == 0
    run = RunFolder(place / "run")
    samples, scores = (list(rows.of_stage(run, 1, stage)) for stage in ("sample", "score"))
    for post, sample, score in zip(run.draw(1)["rows"], samples, scores, strict=True):
        for i, generation in enumerate(sample["generations"]):
            given = score["parts"]["brevity"][i] if name == "my_total.yaml" else score["rewards"][i]
            words = len(generation["text"].split())
            assert given == (-abs(words - post) if generation["text"] else None)
            if name == "my_total.yaml" and given is not None:
                parts = score["parts"]["quality"][i] + 0.05 * given
                assert score["rewards"][i] == pytest.approx(parts, abs=1e-9)


def test_the_table_of_methods_is_the_table_of_methods() -> None:
    section = README.partition("## Methods and rewards")[2].partition("**A reward of your own**")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(METHODS)


def test_a_method_of_your_own(place: Path, tiny_config: Path) -> None:
    package = _package(place)
    (package / "methods/halves.py").write_text(example("alt_hpc/methods/halves.py"))
    init = package / "methods/__init__.py"
    text = init.read_text().replace("    best,\n", "    best,\n    halves,\n")
    init.write_text(
        text.replace('    "words": words,', '    "words": words,\n    "halves": halves,')
    )
    chosen = [f"run={place}/run", "method={kind: halves, history: 1}", "iterations=1"]
    chosen += ["cluster.backend=local", "cluster.train={}"]
    sets = [word for one in chosen for word in ("--set", one)]
    done = subprocess.run(
        [sys.executable, "-m", "alt_hpc", "run", str(tiny_config), *sets],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Write well. |" in (place / "run/report.md").read_text()

"""Fixtures that several files share: tiny models, data on disk, throw-away Slurm clusters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import embedded
import faults_table
import pytest
import throwaway

from alt_hpc import config as configs
from alt_hpc.control import start
from alt_hpc.run.folder import RunFolder

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"  # jobs run this checkout, and the tests' tasks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="break runs in every way, not just some")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --faults only the representative core of the fault tests is run."""
    if config.getoption("--faults"):
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --faults, `faults.md` after the last test."""
    if session.config.getoption("--faults") and faults_table.TABLE:
        faults_table.write()


@pytest.fixture(scope="session")
def tiny_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random policy, a tiny reward model and a few prompts."""
    import tiny
    import transformers

    place = tmp_path_factory.mktemp("tiny")
    tiny.folder(place / "policy", "tied")
    classifier = transformers.AutoModelForSequenceClassification
    tiny.folder(place / "reward", "llama", classifier, num_labels=1)
    posts = [
        f"SUBREDDIT: r/x\nTITLE: post {i}\nPOST: input: Excellent. TL;DR: words {i % 7}\nTL;DR:"
        for i in range(24)
    ]
    (place / "data").mkdir()
    for split, rows in (("train", posts), ("valid", posts[:6]), ("test", posts[6:9])):
        lines = [json.dumps({"prompt": p, "label": f"about {p[-12:-8]}"}) for p in rows]
        (place / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="session")
def tiny_config(tiny_place: Path) -> Path:
    """A config of two iterations over them; training spans 2 nodes of 2 tasks."""
    path = tiny_place / "config.yaml"
    path.write_text(
        f"""
run: {tiny_place}/run
seed: 3
iterations: 2
policy: {{model: {tiny_place}/policy, dtype: float32, dropout: 0.1}}
reward: {{model: {tiny_place}/reward}}
data: {{prompts: {{path: {tiny_place}/data, test: test}}}}
sample: {{prompts: 12, generations: 6, max_new_tokens: 8, group: 2}}
train:
  epochs: 1
  global_batch: 8
  micro_batch: 2
  precision: float32
  lr: 1e-3
  deepspeed: {ROOT}/configs/deepspeed/zero2.json
evaluate: {{max_new_tokens: 8, group: 3, drawn: {{posts: 4, answers: 4}}}}
cluster:
  backend: slurm
  slots: 2
  minutes: 20
  sample: {{shards: 3, parallel: 2}}
  train: {{nodes: 2, tasks_per_node: 2}}
"""
    )
    return path


@pytest.fixture(scope="session")
def undisturbed(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The tiny config run whole on the local backend, with another number of shards."""
    place = tmp_path_factory.mktemp("local") / "run"
    overrides = [
        f"run={place}",
        "cluster.backend=local",
        "cluster.sample.shards=1",
    ]
    assert start.run(configs.load(tiny_config, overrides)) == 0
    return RunFolder(place)


@pytest.fixture
def slurm(slurm_starter: Callable[..., None]) -> None:
    """A Slurm cluster of 4 virtual nodes, without accounting (sacct disabled)."""
    slurm_starter()


@pytest.fixture
def slurm_with_accounting(slurm_starter: Callable[..., None]) -> None:
    """As `slurm`, with slurmdbd, so that sacct works."""
    slurm_starter("--accounting")


@pytest.fixture
def slurm_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Starts one throw-away cluster for the test and stops it afterwards.

    A test that needs Slurm fails where there is none: it is never skipped.
    """
    place = Path("/tmp") / f"alt-hpc-test-{os.getpid()}"
    yield lambda *options: monkeypatch.setenv(*throwaway.start(place, *options))
    throwaway.stop(place)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct."""
    return embedded.smollm2()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real posts, from ALT_HPC_DATA; visibly skipped where absent, a failure in CI."""
    place = Path(os.environ.get("ALT_HPC_DATA", ""))
    if not (place / "tldr").is_dir():
        message = f"no real data: ALT_HPC_DATA={os.environ.get('ALT_HPC_DATA', '')!r}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return place

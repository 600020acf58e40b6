"""The GPU's check at tiny sizes on the CPU, and the memory that its run has taken.

What it measures on a GPU is not tested here: none is there.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

from alt_hpc.control import memory, preview
from alt_hpc.control.needs import Needs
from alt_hpc.graph import EVALUATE, REPORT, SAMPLE, TRAIN
from alt_hpc.lm import gpu, load, prefix
from alt_hpc.run.folder import RunFolder

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/gpu"))
import fast  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `bash tests/gpu.sh --tiny` has written."""
    place = tmp_path_factory.mktemp("gpu") / "results"
    command = ["bash", str(ROOT / "tests/gpu.sh"), "--tiny", "--to", str(place)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_all_parts_work_on_a_cpu(made: Path) -> None:
    text = (made / "results.md").read_text()
    assert "Made on a CPU at tiny sizes" in text
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert parts == ["Fast paths beside plain ones", "A run", "Speed"]
    assert len(re.findall(r"^As it should be; \d+ s\.$", text, re.MULTILINE)) == 3
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    compared = [row for row in rows if len(row) == 6 and row[1] in ("bfloat16", "float16")]
    assert {row[-1] for row in compared} == {"good"}
    paths = ["sampling", "greedy", "scoring", "log-probabilities", "loss", "gradients of loss"]
    paths += ["siblings", "gradients of siblings", "behind", "gradients of behind"]
    paths += ["scoring together", "log-probabilities together"]
    for path in [*paths, "KL, trunk shared", "its gradients"]:
        assert [row[1] for row in compared if row[0] == path] == ["bfloat16", "float16"], path
    chosen = {row[0]: row[2] for row in rows if len(row) == 4 and "chosen" in row[0]}
    assert re.fullmatch(r"\d+ tokens/s", chosen["sampling, chosen"])
    assert re.fullmatch(r".*\d+% of the floor", chosen["scoring, chosen"])
    assert re.fullmatch(r"\d+ tokens/s, \S+ TFLOP/s, MFU \d+%", chosen["training, chosen"])


def test_an_estimate_is_near_what_a_run_has_taken(made: Path) -> None:
    """Above what a task has that loads no model, within a factor of 1.8."""
    run = RunFolder(made / "made/run")
    bare, _ = memory.seen(run, REPORT)
    needs = Needs(run.config(), run)
    assert bare is not None
    for stage in (SAMPLE, TRAIN, EVALUATE):
        (row,) = memory.estimate(needs, stage)
        assert row.of == "host"
        assert row.seen is not None
        assert 1 / 1.8 < row.held.all / (row.seen - bare) < 1.8, (stage, row, bare)


def test_the_plan_shows_estimate_seen_and_given(made: Path) -> None:
    run = RunFolder(made / "made/run")
    shown = preview.preview(run.config())
    assert "nothing to submit" in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if " host " in line}
    assert {"sample", "score", "train", "evaluate", "measure"} == lines.keys()
    for stage in ("sample", "train"):
        seen, _ = memory.seen(run, stage)
        assert lines[stage][-2:] == [f"{(seen or 0) / 2**30:.2f}", "-"]


@pytest.mark.parametrize("name", sorted(prefix.SIDE_BY_SIDE))
def test_the_ways_of_a_gpu_compute_what_transformers_does(name: str) -> None:
    """Forced upon a CPU: logits and gradients are those of transformers but for rounding."""
    model = load.ready(tiny.model(name), torch.device("cpu")).requires_grad_(True)
    ids = torch.tensor([[*range(3, 40)], [*range(60, 97)]])
    with torch.no_grad():  # a weight of 1 everywhere would hide that it is left out
        for weight in model.parameters():
            weight.mul_(1 + torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)))

    def computed() -> list[torch.Tensor]:
        logits = model(ids).logits
        loss = logits.log_softmax(-1)[..., 5].sum()
        return [logits, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    expected = computed()
    with fast.plainly(False), mock.patch.object(gpu._Turned, "apply", wraps=gpu._Turned.apply) as f:
        found = computed()
    assert f.called == (name in gpu.KNOWN)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_planted_fault_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that sees what stands behind it, and its siblings."""
    exact = tiny.model("llama")
    model = copy.deepcopy(exact).bfloat16()

    def bad() -> set[str]:
        found = fast.losses(exact, model)
        each = [(what, fast._far(plain, true), fast._far(ours, true)) for what, (true, plain, ours)
                in found]  # fmt: skip
        kind = "bfloat16"
        return {p for p, *far in each if fast.Compared(p, "llama", kind, *far).badness > 1}

    assert bad() == set()
    monkeypatch.setattr(
        "alt_hpc.training.losses.sight",
        lambda owners, slots, dtype, causal: prefix.sight(owners, slots, dtype),
    )
    assert bad() == {"siblings", "gradients of siblings", "behind", "gradients of behind"}

"""Adam's moments between the iterations of a run, and what becomes of their file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from alt_hpc import config as configs
from alt_hpc.control import start
from alt_hpc.data import draws
from alt_hpc.graph import Piece
from alt_hpc.run.folder import RunFolder
from alt_hpc.task import StageTask


def _iteration(runs: list[RunFolder], k: int) -> None:
    """Make what training is made from here, and train all of these runs at once."""
    training = []
    for run in runs:
        draws.begin(run, k)
        for stage in ("sample", "score"):
            StageTask(str(run.path), stage, k, (0,), 1).make()
        command = [sys.executable, "-m", "alt_hpc", "stage", "train", str(run.path)]
        training.append(subprocess.Popen([*command, "--iteration", str(k)], stderr=subprocess.PIPE))
    for process in training:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()[-4000:]


def test_the_second_iteration_goes_on_with_the_moments_of_the_first(
    tiny_config: Path, tmp_path: Path
) -> None:
    small = ["cluster.train={}", "cluster.sample.shards=1", "sample.prompts=4", "keep=1"]
    runs = [
        start.prepare(configs.load(tiny_config, [f"run={tmp_path}/{carry}", *small, key]))
        for carry, key in ((c, f"train.carry_moments={str(c).lower()}") for c in (False, True))
    ]
    for k in (1, 2):
        _iteration(runs, k)
    without, carried = ([run.manifests.open(Piece(k, "train")) for k in (1, 2)] for run in runs)
    assert not any("moments.safetensors" in made.files for _, made in without)
    assert all("moments.safetensors" in made.files for _, made in carried)
    weights = [
        [load_file(f / "policy/model.safetensors") for f, _ in m] for m in (without, carried)
    ]
    (first, second), (same, other) = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(second[name], other[name]) for name in second)
    steps = [made.facts["steps"] for _, made in carried]
    one, two = (load_file(folder / "moments.safetensors") for folder, _ in carried)
    assert (one["step"], two["step"]) == (steps[0], sum(steps))
    assert list(one) == list(two)
    policy = runs[1].path / "policies" / "002"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(policy)
    assert {name.rpartition(".")[0] for name in two} - {""} <= {*loaded.state_dict()}
    runs[1].manifests.remove_policy(Piece(2, "train"))
    assert not (carried[1][0] / "moments.safetensors").exists()
    assert runs[1].manifests.get(Piece(2, "train")) is not None

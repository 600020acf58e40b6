"""A real run of two iterations: sampling, a reward model, DeepSpeed with KL, evaluation."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
import tiny
import torch
import transformers as tf

from alt_hpc import config as configs
from alt_hpc.control import memory
from alt_hpc.graph import SAMPLE, TRAIN
from alt_hpc.run.files import read_lines
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import METRICS_FILE

WITHIN_S = 300
POST = "SUBREDDIT: r/x\nTITLE: post {i}\nPOST: {words}\nTL;DR:"
CONFIG = """
run: {place}/run
seed: 3
iterations: 2
policy: {{model: {place}/policy, max_length: {most}}}
reward: {{model: {place}/reward, dtype: bfloat16}}
data: {{prompts: {{path: {place}/data}}}}
sample: {{prompts: {prompts}, generations: 24, max_new_tokens: {new}, group: 16}}
train: {{epochs: 1, global_batch: 20, micro_batch: 10, trained_blocks: 0.5, kl: 0.05, lr: 1e-3}}
evaluate: {{max_new_tokens: {new}, drawn: {{posts: 2, answers: 4}}}}
cluster: {{backend: local, slots: {slots}}}
"""


def prepared(place: Path, device: torch.device, small: bool) -> Path:
    """A policy of a real shape, a reward model, posts and a config."""
    place.mkdir(parents=True)
    shapes.folder(place / "policy", "30M" if small else "135M", device)
    classifier = tf.AutoModelForSequenceClassification
    tiny.folder(place / "reward", "llama", classifier, num_labels=1)
    (place / "data").mkdir()
    for split, count in (("train", 8 if small else 64), ("valid", 2 if small else 16)):
        posts = [POST.format(i=i, words="words " * (300 + i % 7)) for i in range(count)]
        text = "".join(
            json.dumps({"prompt": post, "label": "about words"}) + "\n" for post in posts
        )
        (place / "data" / f"{split}.jsonl").write_text(text)
    sizes = {"prompts": 64, "new": 64, "most": 512, "slots": 3}
    if small:
        sizes = {"prompts": 4, "new": 8, "most": 128, "slots": 2}
    (place / "config.yaml").write_text(CONFIG.format(place=place, **sizes))
    return place / "config.yaml"


def report(place: Path, device: torch.device, small: bool, write: Callable[[str], None]) -> bool:
    """What came out, in Markdown; whether it is as it should be."""
    config = prepared(place, device, small)
    with (place / "log").open("w") as log:
        # Interrupted it ends its tasks too; killed it would not.
        command = ["timeout", "--signal=INT", str(800 if small else WITHIN_S), sys.executable]
        command += ["-m", "alt_hpc", "run", str(config)]
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    run, problems = RunFolder(place / "run"), list[str]()
    if code:
        write("\n".join(["```", *(place / "log").read_text().splitlines()[-12:], "```"]))
        return False
    write("| stage | s | tokens/s | device | DeepSpeed |\n|---|---|---|---|---|")
    for k, stage in itertools.product((1, 2), (SAMPLE, TRAIN)):
        (piece,) = run.graph().of(k, stage)
        folder, manifest = run.manifests.open(piece)
        facts = manifest.facts
        speed = facts["tokens"] / facts["seconds"]
        cells = [f"{stage} {k}", f"{facts['seconds']:.1f}", f"{speed:.0f}", facts["device"]]
        write(f"| {' | '.join([*cells, facts['packages'].get('deepspeed', '-')])} |")
        if stage == TRAIN:
            problems += _wrong(list(read_lines(folder / METRICS_FILE)), k)
        if device.type == "cuda" and facts["device"] != torch.cuda.get_device_name():
            problems.append(f"{piece} was not made on the GPU")
    write("\n".join(["\n```", *memory.table(configs.load(config), run), "```\n"]))
    problems += _unchanged(run)
    write("; ".join(problems) or "The losses are finite; what is trained has moved, and no more.")
    return not problems


def _wrong(steps: list[dict[str, Any]], k: int) -> list[str]:
    values = [[row["loss"], *row["parts"].values(), row["grad_norm"]] for row in steps]
    finite = all(math.isfinite(value) for row in values for value in row)
    kl = any(row["parts"]["kl"] > 0 for row in steps)
    return [f"train {k}: a step is not finite"] * (not finite) + [f"train {k}: KL is 0"] * (not kl)


def _unchanged(run: RunFolder) -> list[str]:
    """The exports load, what is trained differs from the start, what is not does not."""
    policies = [Path(run.config().policy.model or ""), run.layout.policy(2)]
    first, last = (tf.AutoModelForCausalLM.from_pretrained(place) for place in policies)
    moved = {
        name
        for (name, a), b in zip(first.named_parameters(), last.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    half = first.config.num_hidden_layers // 2
    low = any(f".layers.{i}." in name for name in moved for i in range(half))
    top = all(any(f".layers.{i}." in name for name in moved) for i in range(half, 2 * half))
    return ["a frozen block has moved"] * low + ["a trained block has not moved"] * (not top)

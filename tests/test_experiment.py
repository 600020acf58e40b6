"""The experiment on real TL;DR, in miniature: its configs, its one command, its splits."""

from __future__ import annotations

import csv
import gc
import glob
import hashlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import here
import pytest
import tiny

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.clusters.local import Element
from alt_hpc.control import start
from alt_hpc.run.folder import flat

FOLDER = Path(__file__).parent.parent / "configs/experiments/tldr_smollm2"
ARMS = ("behind", "front", "bos", "quark", "best", "none", "shuffled", "unfiltered")
CONTROLS = ("best", "none", "shuffled", "unfiltered")
SMALL = {
    "iterations": 1,
    "sample.prompts": 6,
    "sample.generations": 10,
    "sample.max_new_tokens": 6,
    "method.only_finished": "false",
    "evaluate.drawn": "{posts: 2, answers: 2}",
    "evaluate.prompts": 3,
    "evaluate.test_prompts": 2,
    "evaluate.sets.news.prompts": 2,
    "cluster.sample.shards": 1,
    "cluster.evaluate.shards": 1,
    "cluster.train": "{}",
}


# ---------------------------------------------------------------------- the configs


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_from_the_first_one_in_what_it_is_for(name: str) -> None:
    """Policy, reward, data, draws, sampling, steps and schedule are the same."""
    own = {"domain.template", "method.kind", "method.only_finished"}
    if name == "quark":
        own |= {"method.texts", "train.kl", "train.train_embeddings"}
    mine, first = (flat(configs.load(FOLDER / f"{one}.yaml").frozen()) for one in (name, "behind"))
    assert {key for key in mine | first if mine.get(key) != first.get(key)} <= own


def test_both_reward_models_are_trained_alike_on_the_halves() -> None:
    a, b = (configs.load(FOLDER / f"{one}.yaml") for one in ("start", "second"))
    assert (a.reward, a.reward_model) == (b.reward, b.reward_model)
    assert a.data.comparisons is not None
    assert a.data.comparisons.half == "a"
    assert a.data.comparisons.model_copy(update={"half": "b"}) == b.data.comparisons
    for name in ARMS:
        arm = configs.load(FOLDER / f"{name}.yaml")
        assert arm.reward.named()["model"].name == f"{a.run}/reward-model"
        assert arm.measure.further["second"].named()["model"].name == f"{b.run}/reward-model"
        assert (arm.policy.model, arm.data.prompts) == (f"{a.run}/policies/000", a.data.prompts)


# ---------------------------------------------------------------------- the command


def post(name: str, title: str = "T") -> str:
    return f"SUBREDDIT: r/x\nTITLE: {title}\nPOST: my {name}\nTL;DR:"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Posts s0 … s15 to fine-tune on, c0 … c11 compared, p0 … p11 prompts, v, t held out.

    Four of the compared stand among the first too, under other titles and in capitals; so does a
    held-out one.
    """
    place = tmp_path_factory.mktemp("data")
    labelled = [post(f"s{i}") for i in range(16)]
    labelled += [post(f"c{i}", "Another").replace("my", "MY ") for i in range(4)] + [post("v1")]
    pairs = [post(f"c{i}") for i in range(12) for _ in range(2)]
    rows = {
        "tldr/train": [{"prompt": p, "label": "a s"} for p in labelled],
        "tldr/valid": [{"prompt": post(f"v{i}"), "label": "a v"} for i in range(4)],
        "tldr/test": [{"prompt": post(f"t{i}"), "label": "a t"} for i in range(4)],
        "prompts/train": [{"prompt": post(f"p{i}")} for i in range(12)] + [{"prompt": post("v2")}],
        "comparisons/train": [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in pairs],
        "comparisons/valid": [
            {"prompt": post(f"v{i}"), "chosen": " good", "rejected": " bad"} for i in range(3)
        ],
        "cnn_dailymail/test": [{"article": f"news {i}", "highlights": f"n {i}"} for i in range(4)],
    }
    for name, its in rows.items():
        path = place / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in its))
    return place


class Inline(here.Here):
    """This process in place of the local backend: no task starts an interpreter."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.elements = ()  # that are told of

    def turn(self, tick: object) -> list[Element]:
        return []

    def end_all(self) -> None:
        pass


def command(
    data: Path,
    runs: Path,
    model: Path,
    python: str,
    options: tuple[str, ...] = (),
    seeds: str = "1",
    place: str = "",
) -> str:
    """What `run.sh` says where a line of bash is its interpreter; `place`: the place it finds."""
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    settings = [*options] or settings
    program = runs.parent / "python"
    chosen = f'case "$1" in */place.py) echo {place}; exit;; esac\n' if place else ""
    program.write_text(f"#!/bin/bash\n{chosen}{python}\n")
    program.chmod(0o755)
    own = {"ALT_HPC_SMOLLM2": str(model), "SEEDS": seeds, "PYTHON": str(program)}
    root = FOLDER.parents[2]
    script = (FOLDER / "run.sh").relative_to(root)
    elsewhere = runs.parent / "elsewhere"  # where a person's `cd` looks first
    (elsewhere / script.parent).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["bash", str(script), str(data), str(runs), *settings],
        cwd=root,
        env=os.environ | own | {"CDPATH": str(elsewhere)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one whose tokenizer has a BOS."""
    place = tiny.folder(tmp_path_factory.mktemp("model"), "tied")
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def runs(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command's own commands make, each carried out in this process.

    The words are told to be best after a BOS.
    """
    place = tmp_path_factory.mktemp("experiment") / "runs"
    say = "printf '%q ' \"$@\"; echo"
    told = command(data, place, model, say, place="bos").splitlines()
    assert "the better place: bos" in told
    commands = [line for line in told if line.startswith("-m ")]
    with pytest.MonkeyPatch.context() as here_is, (place / "said").open("w") as said:
        here_is.setenv("DS_ACCELERATOR", "cpu")
        importlib.import_module("deepspeed")  # once, for all children
        gc.collect()
        gc.freeze()  # stages collect garbage often: not through all of these modules again
        here_is.chdir(place)
        here_is.setattr(start, "Local", Inline)
        here_is.setattr(sys, "stdout", said)
        for line in commands:
            python, module, *given = shlex.split(line)
            assert (python, module) == ("-m", "alt_hpc")
            words = [found for word in given for found in (sorted(glob.glob(word)) or [word])]
            alone = [f"--set=cluster.{name}={{}}" for name in ("sft", "reward_model", "train")]
            assert main([*words, *(alone if given[0] == "run" else [])]) == 0
    gc.unfreeze()
    return place


@pytest.fixture
def said(runs: Path) -> str:
    return (runs / "said").read_text()


def frozen(run: Path, name: str) -> list[str]:
    """What posts a run has frozen under a name."""
    lines = (run / "data" / f"{name}.jsonl").read_text().splitlines()
    return [re.sub(r"(?s).*POST: \w+ +(\w+)\n.*", r"\1", json.loads(n)["prompt"]) for n in lines]


def test_no_split_learns_what_another_one_is_measured_with(said: str, runs: Path) -> None:
    first, second = runs / "start", runs / "second"
    assert frozen(first, "sft-train") == [f"s{i}" for i in range(16)]
    for run in (first, second, *(runs / f"{arm}-seed1" for arm in ARMS)):
        assert frozen(run, "prompts-train") == [f"p{i}" for i in range(12)]
    halves = [frozen(run, "comparisons-train") for run in (first, second)]
    learned = [("sft", first, 16), ("reward-model", first, len(halves[0]))]
    for stage, run, count in [*learned, ("reward-model", second, len(halves[1]))]:
        manifest = run / "iterations/000" / stage / "00000/manifest.json"
        assert json.loads(manifest.read_text())["rows"] == count
    for number in range(12):
        words = f" my c{number}".split()
        half = hashlib.sha256(" ".join(words).encode()).digest()[-1] % 2
        assert halves[half].count(f"c{number}") == 2
        assert halves[1 - half].count(f"c{number}") == 0
    shared = [line.split("|")[1:6] for line in said.splitlines() if line.startswith("| prompts-v")]
    found = {tuple(cell.strip() for cell in cells) for cells in shared}
    assert found == {("prompts-valid", "comparisons-valid", "3", "3", "3")}


def rows(run: Path, stage: str, name: str) -> Iterator[Any]:
    """The rows of iteration 1's pieces."""
    for shard in sorted((run / "iterations/001" / stage).iterdir()):
        folder = json.loads((shard / "manifest.json").read_text())["folder"]
        yield from map(json.loads, (shard / folder / name).read_text().splitlines())


def test_arms_train_as_much_on_the_same_samples(said: str, runs: Path) -> None:
    """The controls take them from the arm of the better place; the others make them alike."""
    samples, scores, learned = (dict[str, Any]() for _ in range(3))
    for arm in ARMS:
        run = runs / f"{arm}-seed1"
        samples[arm] = [row["generations"] for row in rows(run, "sample", "samples.jsonl")]
        scores[arm] = [row["rewards"] for row in rows(run, "score", "scores.jsonl")]
        steps = list(rows(run, "train", "metrics.jsonl"))
        learned[arm] = len(steps), [step["lr"] for step in steps]
    for arm in ARMS:
        assert samples[arm] == samples["behind"], arm
        assert scores[arm] == scores["behind"], arm
        assert learned[arm] == learned["behind"], arm
    assert f"from {runs}/bos-seed1: " in said
    assert {arm for arm in ARMS if _took(runs, arm)} == {*CONTROLS}


def _took(runs: Path, arm: str) -> bool:
    manifest = runs / f"{arm}-seed1/iterations/001/sample/00000/manifest.json"
    return "from" in json.loads(manifest.read_text())["facts"]


def test_all_are_in_the_results(said: str, runs: Path) -> None:
    lines = list(csv.DictReader((runs / "results/table.csv").read_text().splitlines()))
    for name in ("valid", "test", "news"):
        found = {line["row"].split(",")[0]: line for line in lines if line["set"] == name}
        titles = {"ALT-RM", "ALT-RM (behind)", "ALT-RM (after BOS)", "Quark", "start", "references"}
        titles |= {f"Control: {kind}" for kind in ("best", "none")}
        titles |= {f"Control: {kind} (after BOS)" for kind in ("shuffled", "unfiltered")}
        assert {*found} == titles | {"best_of_16 (best of 16 by the reward)"}
        assert all(line["second"] for line in found.values())
    assert "is not compared" not in said


def test_the_place_is_where_the_best_word_gains_most(runs: Path, tmp_path: Path) -> None:
    def found(report: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(FOLDER / "place.py"), str(report)]
        return subprocess.run(words, capture_output=True, text=True)

    assert sorted(found(runs / "place").stderr.split()[::2]) == ["behind:", "bos:", "front:"]
    table = """set,method,effect,what,reward of,reward
        valid,ALT-RM (behind),gain,x,reward,-0.2
        valid,ALT-RM (behind),gain,x,second,0.9
        test,ALT-RM,gain,x,reward,0.9
        valid,ALT-RM,control,x,reward,0.9
        valid,ALT-RM (after BOS),gain,x,reward,-0.3
        valid,ALT-RM,gain,x,reward,-0.1"""
    file = tmp_path / "effects.csv"
    file.write_text(table.replace("\n        ", "\n"))
    assert found(tmp_path).stdout == "front\n"
    file.write_text("\n".join(file.read_text().split("\n")[:-1]))
    assert found(tmp_path).returncode == 1
    assert "missing (behind, bos)" in found(tmp_path).stderr


@pytest.mark.parametrize("place", ["behind", "front"])
@pytest.mark.parametrize("way", ["--slurm", "--small", "--gpu"])
def test_other_ways_make_the_same_arms(
    way: str, place: str, data: Path, model: Path, tmp_path: Path
) -> None:
    """All are there, each a config that can be run, and alike but for what they are for."""
    say = 'line=$(printf \'%q \' "$@"); echo "$line"'  # at once: two commands run at a time
    told = command(data, tmp_path / "runs", model, say, (way,), "1,2,3", place)
    given = [shlex.split(line)[2:] for line in told.splitlines() if line.startswith("-m ")]
    made = dict[str, dict[str, Any]]()
    for words in (words for words in given if words[0] in ("run", "submit")):
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        seeds = words[words.index("--seeds") + 1] if "--seeds" in words else "0"
        for name in (word for word in words if word.endswith(".yaml")):
            config = configs.load(name, sets)
            made |= {f"{config.run} {seed}": flat(config.frozen()) for seed in seeds.split(",")}
    primary = (place, "best", "none", "shuffled")
    assert {*made} == {"start 0", "second 0", *(f"{arm} 1" for arm in ARMS)} | {
        f"{arm} {seed}" for arm in primary for seed in (2, 3)
    }
    for name in ("sample.prompts", "iterations", "train.lr", "data.prompts.longest"):
        assert len({str(made[one].get(name)) for one in made if one[-1] != "0"}) == 1, name
    template = made[f"{place} 1"]["domain.template"]
    assert {made[f"{name} 1"]["domain.template"] for name in CONTROLS} == {template}
    own = flat(configs.load(FOLDER / "quark.yaml").frozen())["domain.template"]
    assert made["quark 1"]["domain.template"] == own
    small = way == "--small"
    assert made["start 0"]["reward_model.head_only"] == ("true" if small else "false")
    assert made["behind 1"]["sample.prompts"] == ("48" if small else "128")
    if way == "--gpu":  # four at once, seeds one after the other
        order = [words[words.index("--seeds") + 1] for words in given if "--seeds" in words]
        assert order == [*"1" * 8, *"2" * 4, *"3" * 4]


@pytest.mark.parametrize("way", ["--small", "--gpu"])
def test_what_ends_the_command_ends_all_that_it_runs(
    way: str, data: Path, model: Path, tmp_path: Path
) -> None:
    """One of the runs goes on for long; another one beside it fails."""
    first = f"trap 'touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/begun"
    first += "; exec &> /dev/null; for i in {1..600}; do sleep 0.1; done"
    other = f"while [ ! -e {tmp_path}/begun ]; do sleep 0.1; done; exit 7"
    long, bad = ("/behind.y", "/quark.y") if way == "--small" else ("/behind.y", "/front.y")
    program = f'case "$*" in *"{long}"*) {first};; *"{bad}"*) {other};; esac'
    with pytest.raises(AssertionError):
        command(data, tmp_path / "runs", model, program, (way,), "1,2")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.faults
def test_the_command_given_again_makes_nothing_anew(
    data: Path, model: Path, tmp_path: Path
) -> None:
    """As a person gives it: with the local backend."""
    made = list[dict[Path, int]]()
    for _ in range(2):
        command(data, tmp_path / "runs", model, f'exec {sys.executable} "$@"')
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")})
    assert made[0] == made[1] != {}

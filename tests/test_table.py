"""A full table from two commands: two methods, two seeds, every row and column, two sets."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_rows import others  # noqa: F401

from alt_hpc.__main__ import main

SETS = {"valid": 6, "news": 8}


@pytest.fixture(scope="module")
def runs(
    tiny_config: Path,
    others: list[str],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """Two configs and two seeds, by one command; then `alt-hpc report` over all of them."""
    place = tmp_path_factory.mktemp("table")
    common = yaml.safe_load(tiny_config.read_text()) | {"iterations": 1}
    common["cluster"] |= {"backend": "local", "train": {}}
    for setting in others:
        key, _, value = setting.partition("=")
        common[key] = common.get(key, {}) | json.loads(value)
    few = {k: v for k, v in common["evaluate"].items() if k not in ("policies", "references")}
    none = common | {"evaluate": few, "method": {"kind": "none"}}
    for name, config in (("words", common), ("none", none)):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(config | {"run": f"{place}/{name}"}))
    configs = [f"{place}/words.yaml", f"{place}/none.yaml"]
    assert main(["run", *configs, "--seeds", "1,2"]) == 0
    found = [place / f"{name}-seed{seed}" for name in ("words", "none") for seed in (1, 2)]
    assert main(["report", *map(str, found), "--to", str(place / "table")]) == 0
    return found


@pytest.fixture(scope="module")
def table(runs: list[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of table.csv by set and row."""
    text = (runs[0].parent / "table/table.csv").read_text()
    return {(line["set"], line["row"]): line for line in csv.DictReader(text.splitlines())}


def rows(run: Path, k: int, **wanted: str) -> list[dict[str, Any]]:
    """Answers with their measures, read from the files alone."""
    found = []
    for shard in sorted((run / f"iterations/{k:03d}/evaluate").iterdir()):
        both = []
        for stage, name in (("evaluate", "answers"), ("measure", "measures")):
            folder = run / f"iterations/{k:03d}" / stage / shard.name
            about = json.loads((folder / "manifest.json").read_text())
            lines = (folder / about["folder"] / f"{name}.jsonl").read_text().splitlines()
            both.append([json.loads(line) for line in lines])
        found += [{**answer, **measured} for answer, measured in zip(*both, strict=True)]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def figures(answers: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of one run's answers, by numpy."""
    perplexities = [row["perplexity"] for row in answers if row["perplexity"] is not None]
    found = {
        "reward": mean([row["reward"] for row in answers]),
        "second": mean([row["further"]["second"] for row in answers]),
        "perplexity": mean(perplexities),
        "perplexity_median": float(np.median(perplexities)),
        "length": mean([row["length"] for row in answers]),
        "truncated": mean([float(row["ended"] == "limit") for row in answers]),
    }
    for name in ("rouge1", "rouge2", "rougeL"):
        found[name] = mean([(row["rouge"] or {}).get(name) for row in answers])
    return found


def expected(runs: list[Path], name: str) -> dict[str, list[list[dict[str, Any]]]]:
    """The answers of each row of a set's table, run by run."""
    words, none = runs[:2], runs[2:]
    found = {"start": [rows(run, 0, policy="own", set=name, variant="plain") for run in words[:1]]}
    for policy, label in (
        ("references", "references"),
        ("ppo", "ppo"),
        ("best_of_16", "best_of_16 (best of 16 by the reward)"),
        ("best_of_16_ppo", "best_of_16_ppo (best of 16 by the reward)"),
    ):
        found[label] = [rows(run, 0, policy=policy, set=name, variant="asked") for run in words]
    texts = ["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."]
    variants = ["best", "quantile 1", "quantile 2", "quantile 3", "worst"]
    for variant, text in zip(["plain", *variants], ["plain", *texts], strict=True):
        found[f"ALT-RM, {text}"] = [
            rows(run, 1, policy="own", set=name, variant=variant) for run in words
        ]
    found["Control: none, plain"] = [
        rows(run, 1, policy="own", set=name, variant="plain") for run in none
    ]
    return found


@pytest.mark.parametrize("name", SETS)
def test_every_figure_is_what_the_rows_say(
    runs: list[Path], table: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    wanted = expected(runs, name)
    assert {row for of, row in table if of == name} == wanted.keys()
    for row, each in wanted.items():
        line = table[name, row]
        assert int(line["posts"]) == SETS[name]
        ours = [figures(answers) for answers in each]
        for column in ours[0]:
            values = [one[column] for one in ours]
            if any(value is None for value in values):
                assert line[column] == ""
                continue
            assert float(line[column]) == pytest.approx(mean(values), rel=1e-9), (row, column)


@pytest.mark.parametrize("name", SETS)
def test_distinct_n_is_of_equally_many_words(
    runs: list[Path], table: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    wanted = expected(runs, name)
    fewest = {
        number: min(
            len(row["text"].split())
            for each in wanted.values()
            for answers in each
            for row in answers
            if row["row"] == number
        )
        for number in range(SETS[name])
    }
    for label, each in wanted.items():
        for n in (1, 2, 3):
            values = []
            for answers in each:
                words = [row["text"].split()[: fewest[row["row"]]] for row in answers]
                grams = {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}
                values.append(len(grams) / max(sum(map(len, words)), 1))
            assert float(table[name, label][f"distinct_{n}"]) == pytest.approx(np.mean(values))


def test_what_was_spent(runs: list[Path], table: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Distinct prompts, and tokens sampled, scored and trained on, counted in the files."""
    found = dict[str, list[int]]()
    for run in runs[:2]:
        prompts, sampled, scored = set[str](), 0, 0
        for shard in sorted((run / "iterations/001/sample").iterdir()):
            both = []
            for stage, name in (("sample", "samples"), ("score", "scores")):
                folder = run / "iterations/001" / stage / shard.name
                about = json.loads((folder / "manifest.json").read_text())
                lines = (folder / about["folder"] / f"{name}.jsonl").read_text().splitlines()
                both.append([json.loads(line) for line in lines])
            for sample, score in zip(*both, strict=True):
                prompts.add(sample["prompt"])
                lengths = [len(one["ids"]) for one in sample["generations"]]
                sampled += sum(lengths)
                both_ = zip(lengths, score["rewards"], strict=True)
                scored += sum(length for length, reward in both_ if reward is not None)
        (metrics,) = (run / "iterations/001/train/00000").glob("attempt-*/metrics.jsonl")
        trained = sum(json.loads(line)["loss_tokens"] for line in metrics.read_text().splitlines())
        of = {"prompts": len(prompts), "sampled": sampled, "scored": scored, "trained": trained}
        for key, value in of.items():
            found.setdefault(key, []).append(value)
    line = table["valid", "ALT-RM, Excellent."]
    tokens = {kind: f"tokens_{kind}" for kind in ("sampled", "scored", "trained")}
    columns = {"prompts": "train_prompts", **tokens}
    for key, column in columns.items():
        assert float(line[column]) == pytest.approx(np.mean(found[key])), key
    assert table["valid", "references"]["train_prompts"] == ""


def test_effects_are_differences_on_the_same_posts(runs: list[Path]) -> None:
    text = (runs[0].parent / "table/effects.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    mine = {
        (line["set"], line["method"], line["effect"]): line
        for line in lines
        if line["reward of"] == "reward"
    }
    sides = {"word": ((1, "best"), (1, "plain")), "control": ((1, "best"), (1, "worst"))}
    sides["training"] = ((1, "plain"), (0, "plain"))
    for effect, ((k, variant), (before, other)) in sides.items():
        each = []
        for run in runs[:2]:
            after = rows(run, k, policy="own", set="valid", variant=variant)
            first = rows(run, before, policy="own", set="valid", variant=other)
            each.append(
                np.mean([a["reward"] - b["reward"] for a, b in zip(after, first, strict=False)])
            )
        line = mine["valid", "ALT-RM", effect]
        assert float(line["reward"]) == pytest.approx(np.mean(each), rel=1e-6, abs=1e-9)


def test_the_files_are_what_they_should_be(runs: list[Path], tmp_path: Path) -> None:
    place = runs[0].parent / "table"
    for name in ("reward", "length", "words"):
        assert (place / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (place / f"{name}.svg").read_text()
    page = (place / "report.md").read_text()
    assert all(text in page for text in ("ROUGE-L", "# train", "second", "ALT-RM, Excellent."))
    if tex := shutil.which("pdflatex"):
        body = r"\documentclass{article}\begin{document}\small %s \end{document}"
        inputs = " ".join(rf"\input{{{place}/{name}.tex}}" for name in ("table", "effects"))
        (tmp_path / "all.tex").write_text(body % inputs)
        command = [tex, "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]

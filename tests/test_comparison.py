"""`alt-hpc report`: runs and seeds side by side, every figure against a computation apart."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import here
import numpy as np
import pytest
import tiny
import transformers
from scipy import stats

from alt_hpc.__main__ import main
from alt_hpc.methods import METHODS
from alt_hpc.report import comparison, effects, figures, intervals, page, results, runs, tables
from alt_hpc.report.judged import Judged
from alt_hpc.report.runs import Run
from alt_hpc.run.folder import RunFolder

POSTS = {"valid": 12, "news": 9}
WORDS = {"best": "Excellent.", "quantile 1": "Good.", "worst": "Horrible."}
PUBLISHED = {
    "of": "the card",
    "set": "valid",
    "rows": {"start": {"reward": 2.89, "length": 31.25}, "ppo_50%": {"perplexity": 2.29}},
}
Rows = list[dict[str, Any]]


def answers(policy: str, variant: str, seed: int, better: float) -> Rows:
    """Rows as `results.evaluated` gives them, random but for how good they are."""
    rng = np.random.default_rng([seed, *f"{policy} {variant}".encode()])
    found = list[dict[str, Any]]()
    for name, number in ((name, i) for name, count in POSTS.items() for i in range(count)):
        words = rng.choice(list("abcdefg"), int(rng.integers(2, 9)))
        reward = None if rng.random() < 0.04 else number / 5 + better + rng.normal()
        rouge = {kind: float(rng.random()) for kind in ("rouge1", "rouge2", "rougeL")}
        found.append(
            {
                **{"policy": policy, "set": name, "row": number, "variant": variant},
                **{"prompt": f"post {number} of {name}", "text": " ".join(words)},
                **{"ended": "eos" if rng.random() < 0.8 else "limit", "reward": reward},
                "further": {"other": float(rng.normal())},
                "perplexity": float(1 + rng.random()),
                "length": len(words) * 3,
                "rouge": None if policy == "references" else rouge,
            }
        )
    return found


def run(place: Path, seed: int, method: str = "words", **more: Any) -> Run:
    """A run of one iteration of a policy that the config names, so that all seeds start alike."""
    folder = RunFolder(place)
    folder.config = functools.cache(lambda: SimpleNamespace(method=METHODS[method].Settings()))
    words = WORDS if method == "words" else {}
    start = answers("own", "plain", 0, 0.0)
    others = {"references": 0.5, "best_of_4": 1.0, "ppo_50%": 0.8}
    start += [row for name, by in others.items() for row in answers(name, "asked", 0, by)]
    better = {"best": 2.0, "quantile 1": 1.0, "plain": 0.4, "worst": -1.0}
    kind = len(method)
    end = [r for v in ["plain", *words] for r in answers("own", v, 10 * seed + kind, better[v])]
    made: dict[str, Any] = {
        **{"folder": folder, "title": METHODS[method].Settings().title, "seed": seed, "last": 1},
        **{"alike": method, "words": words, "evaluations": {0: start, 1: end}},
        "costs": dict(zip(runs.COSTS, (7 + seed, 100 * seed, 90 * seed, None), strict=True)),
        "measured": {runs.REWARD_IS: "a", runs.PERPLEXITY_IS: "b", runs.TOKENS_ARE: "64"},
        **{"best_of": {"best_of_4": "best of 4 by the reward"}, "published": PUBLISHED},
        **{"learned": None, "judged": Judged()},
    }
    return Run(**(made | more))


@pytest.fixture
def four(tmp_path: Path) -> list[Run]:
    """Two methods of two seeds each."""
    places = itertools.product(("words", "best"), (1, 2))
    return [run(tmp_path / f"{method}_{seed}", seed, method) for method, seed in places]


Report = Callable[[Sequence[Run]], tuple[str, Path]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """What is said of runs, and the folder with the files."""

    def write(given: Sequence[Run]) -> tuple[str, Path]:
        by_folder = {one.folder: one for one in given}
        monkeypatch.setattr(page, "read", by_folder.__getitem__)
        return page.write([*by_folder], tmp_path / "out"), tmp_path / "out"

    return write


def table(place: Path) -> dict[tuple[str, str], dict[str, str]]:
    """A CSV table's lines, by their set and name."""
    key = "row" if place.name == "table.csv" else "effect"
    with place.open(newline="") as file:
        return {(line["set"], line[key]): line for line in csv.DictReader(file)}


def picked(one: Run, variant: str, name: str, policy: str = "own", k: int = 1) -> Rows:
    wanted = (policy, variant, name)
    rows = one.evaluations[k]
    return [row for row in rows if (row["policy"], row["variant"], row["set"]) == wanted]


# ---------------------------------------------------------------------- every figure


def test_posts_that_were_added_later_set_no_run_apart(
    undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand behind those of other sets; posts that are others do."""
    first = runs.read(undisturbed)
    assert first is not None
    evaluated = results.evaluated

    def read(change: Callable[[Rows], Rows]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(results, "evaluated", lambda *its: change(evaluated(*its)))
            found = runs.read(undisturbed)
        assert found is not None
        return found.alike

    assert read(lambda rows: rows[::-1]) == first.alike
    assert read(lambda rows: [row | {"prompt": "another"} for row in rows]) != first.alike


def test_win_rates_are_columns_by_opponent_and_judge(tmp_path: Path, report: Report) -> None:
    """Means over posts, then over seeds; none of a judge that cannot judge, or is asked apart."""
    won = {1: [1.0, 1.0, 0.5, 0.0, 1.0], 2: [0.0, 0.5, 0.5, 1.0, 1.0]}
    two = []
    for seed, outcomes in won.items():
        posts = {("valid", row): outcome for row, outcome in enumerate(outcomes)}
        wins = {"best over start": posts, "references over start": posts}
        two.append(run(tmp_path / f"run_{seed}", seed, judged=Judged("gpt", "k", "", wins)))
    blind = Judged("small", "k", "cannot judge this (right on 1 to 2 %)", two[0].judged.wins)
    others = [Judged("gpt", "another", "", two[0].judged.wins), blind]
    made = [run(tmp_path / f"best_{i}", i, "best", judged=its) for i, its in enumerate(others)]
    said, place = report([*two, *made])
    lines, column = table(place / "table.csv"), "win rate over start, gpt"
    best = lines["valid", "ALT-RM, Excellent."]
    each = [float(np.mean(outcomes)) for outcomes in won.values()]
    assert float(best[column]) == pytest.approx(np.mean(each))
    half = stats.t.ppf(0.975, 1) * np.std(each, ddof=1) / 2**0.5
    ends = (float(best[f"{column}_seeds_{end}"]) for end in ("low", "high"))
    assert [*ends] == pytest.approx([np.mean(each) - half, np.mean(each) + half])
    assert float(lines["valid", "references"][column]) == pytest.approx(np.mean(each))
    others_there = [line for line in lines.values() if line[column]]
    assert len(others_there) == 2
    assert not [name for name in best if "small" in name]
    assert f"{made[1].name}: no win rates: small cannot judge this (right on 1 to 2 %)" in said
    assert f"{made[0].name}: no win rates: gpt is asked in another way than in the first" in said
    assert f"| {column} |" in re.sub(" +", " ", said)
    assert column in (place / "table.tex").read_text()


@pytest.mark.parametrize("name", ["valid", "news"])
def test_every_figure_is_that_of_a_computation_apart(
    name: str, four: list[Run], report: Report
) -> None:
    _, place = report(four)
    lines = table(place / "table.csv")
    own = {f"ALT-RM, {word}": v for v, word in [("plain", "plain"), *WORDS.items()]}
    title = four[2].title
    found = {
        "start": [picked(four[0], "plain", name, k=0)],
        "references": [picked(four[0], "asked", name, "references", 0)],
        "best_of_4 (best of 4 by the reward)": [picked(four[0], "asked", name, "best_of_4", 0)],
        "ppo_50%": [picked(four[0], "asked", name, "ppo_50%", 0)],
        **{label: [picked(one, v, name) for one in four[:2]] for label, v in own.items()},
        f"{title}, plain": [picked(one, "plain", name) for one in four[2:]],
    }
    assert [row for of, row in lines if of == name] == list(found)
    every = [rows for each in found.values() for rows in each]
    fewest = [min(len(rows[i]["text"].split()) for rows in every) for i in range(POSTS[name])]
    for label, each in found.items():
        line, mean = lines[name, label], functools.partial(_mean, each)
        assert (line["seeds"], line["posts"]) == (str(len(each)), str(POSTS[name]))
        for column, value in {
            "reward": mean(lambda rows: np.mean(_known(r["reward"] for r in rows))),
            "other": mean(lambda rows: np.mean([r["further"]["other"] for r in rows])),
            "perplexity": mean(lambda rows: np.mean([r["perplexity"] for r in rows])),
            "perplexity_median": mean(lambda rows: np.median([r["perplexity"] for r in rows])),
            "length": mean(lambda rows: np.mean([r["length"] for r in rows])),
            "truncated": mean(lambda rows: np.mean([r["ended"] == "limit" for r in rows])),
        }.items():
            assert float(line[column]) == pytest.approx(value), (label, column)
        for n in (1, 2, 3):
            value = mean(lambda rows, n=n: _distinct([r["text"] for r in rows], fewest, n))
            assert float(line[f"distinct_{n}"]) == pytest.approx(value)
        for kind in ("rouge1", "rouge2", "rougeL"):
            if label == "references":
                assert line[kind] == ""
                continue
            value = mean(lambda rows, kind=kind: np.mean([r["rouge"][kind] for r in rows]))
            assert float(line[kind]) == pytest.approx(value)
        means = [np.mean(_known(r["reward"] for r in rows)) for rows in each]
        half = 12.7062 * abs(np.subtract(*means)) / 2 if len(each) > 1 else None
        for end, sign in (("low", -1), ("high", 1)):
            text = line[f"reward_seeds_{end}"]
            assert (
                not text
                if half is None
                else float(text) == pytest.approx(np.mean(means) + sign * half, rel=1e-4)
            )
        low, high = _bootstrapped([{r["row"]: r["reward"] for r in rows} for rows in each])
        ends = float(line["reward_posts_low"]), float(line["reward_posts_high"])
        assert ends == pytest.approx((low, high), abs=0.12 * (high - low))


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _mean(each: Sequence[Rows], figure: Callable[[Rows], Any]) -> float:
    return float(np.mean([figure(rows) for rows in each]))


def _distinct(texts: Sequence[str], fewest: Sequence[int], n: int) -> float:
    grams, words = set(), 0
    for text, count in zip(texts, fewest, strict=True):
        kept = text.split(" ")[:count]
        words += len(kept)
        grams |= {" ".join(kept[i : i + n]) for i in range(len(kept)) if i + n <= len(kept)}
    return len(grams) / words


def _bootstrapped(runs_: Sequence[dict[int, float | None]]) -> tuple[float, float]:
    """Ends of the 95 % interval over posts, which all runs share."""
    rng, posts, means = np.random.default_rng(99), [*runs_[0]], []
    for _ in range(3000):
        drawn = rng.choice(posts, len(posts))
        means.append(np.mean([np.mean(_known(run[i] for i in drawn)) for run in runs_]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_costs_stand_at_the_policies_that_they_made(four: list[Run], report: Report) -> None:
    said, place = report(four)
    lines = table(place / "table.csv")
    best = lines["news", "ALT-RM, Excellent."]
    assert [float(best[name]) for name in runs.COSTS[:3]] == [8.5, 150.0, 135.0]
    assert best["tokens_trained"] == ""  # not known
    assert {lines["news", "ppo_50%"][name] for name in runs.COSTS} == {""}
    assert "# train | tokens sampled | scored |" in said


def test_a_published_figure_and_the_difference_stand_beside(
    four: list[Run], report: Report
) -> None:
    said, place = report(four)
    lines = table(place / "table.csv")
    start, ppo = lines["valid", "start"], lines["valid", "ppo_50%"]
    assert (start["published_reward"], ppo["published_perplexity"]) == ("2.89", "2.29")
    difference = float(start["reward"]) - 2.89
    assert float(start["difference_reward"]) == pytest.approx(difference)
    assert f"{difference:+.3f}" in said
    assert "reward, the card" in said
    assert lines["news", "start"]["published_reward"] == ""  # of another set


# ---------------------------------------------------------------------- effects


def test_effects_are_those_of_a_computation_apart(four: list[Run], report: Report) -> None:
    _, place = report(four)
    with (place / "effects.csv").open(newline="") as file:
        every = [line for line in csv.DictReader(file) if line["set"] == "valid"]
    found = {line["effect"]: line for line in every if line["method"] == "ALT-RM"
             and line["reward of"] == "reward"}  # fmt: skip
    for kind, before, after in [
        ("word", ("plain", 1), ("best", 1)),
        ("training", ("plain", 0), ("plain", 1)),
        ("control", ("worst", 1), ("best", 1)),
        ("gain", ("plain", 0), ("best", 1)),
    ]:
        two = [[picked(one, v, "valid", k=k) for v, k in (before, after)] for one in four[:2]]
        _check(found[kind], two)
    two = [[picked(b, "plain", "valid"), picked(a, "best", "valid")]
           for a, b in zip(four[:2], four[2:], strict=True)]  # fmt: skip
    _check(found["over another"], two)
    assert found["over another"]["what"].startswith("ALT-RM, 'Excellent.' minus ")
    order = []
    for one in four[:2]:
        words = [picked(one, v, "valid") for v in WORDS]
        posts = [[rows[i]["reward"] for rows in words] for i in range(12)]
        order.append(np.mean([stats.spearmanr([2, 1, 0], p)[0] for p in posts if None not in p]))
    assert float(found["order of the words"]["reward"]) == pytest.approx(np.mean(order))
    assert {line["effect"] for line in every if line["method"] != "ALT-RM"} == {"training"}


def _check(line: dict[str, str], two: Sequence[Sequence[Rows]]) -> None:
    """All posts, those where both finished, and equal length; of each run (before, after)."""
    pairs = [[p for p in zip(*one, strict=True) if None not in (p[0]["reward"], p[1]["reward"])]
             for one in two]  # fmt: skip
    ys = [[b["reward"] - a["reward"] for a, b in one] for one in pairs]
    xs = [[b["length"] - a["length"] for a, b in one] for one in pairs]
    both = [[b["reward"] - a["reward"] for a, b in one if a["ended"] == b["ended"] == "eos"]
            for one in pairs]  # fmt: skip
    lines = [np.polyfit(x, y, 1)[1] for x, y in zip(xs, ys, strict=True)]
    assert float(line["reward"]) == pytest.approx(np.mean([np.mean(y) for y in ys]))
    assert float(line["reward_finished"]) == pytest.approx(np.mean([np.mean(y) for y in both]))
    assert float(line["reward_level"]) == pytest.approx(np.mean(lines))
    half = 12.7062 * abs(lines[0] - lines[1]) / 2
    high = float(line["reward_level_seeds_high"])
    assert high - np.mean(lines) == pytest.approx(half, rel=1e-4)


def test_a_word_that_is_better_in_every_post_is_in_order() -> None:
    words = [[{"set": "v", "row": 0, "reward": r}, {"set": "v", "row": 1, "reward": 1.0}]
             for r in (3.0, 2.0, 1.0)]  # fmt: skip
    assert effects.order(words) == {("v", 0): pytest.approx(1.0), ("v", 1): 0.0}
    assert effects.order(words[::-1])[("v", 0)] == pytest.approx(-1.0)


def test_a_gain_that_the_other_reward_does_not_see_is_called_over_optimisation(
    four: list[Run], report: Report
) -> None:
    said, _ = report(four)  # the rewards of `other` are the same for all
    sentences = [line for line in said.splitlines() if line.startswith("over-optimisation: ")]
    assert any("'Excellent.' after iteration 1 minus plain 0" in line for line in sentences)
    for one in four:
        for row in itertools.chain(*one.evaluations.values()):
            row["further"] = {"other": row["reward"]}
    assert "over-optimisation" not in report(four)[0]


def test_methods_of_other_seeds_are_compared_by_post_alone(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", 1), run(tmp_path / "b", 2, "best")
    groups, _ = comparison.grouped([one, other])
    (effect,) = [e for e in effects.effects(groups, "valid")
                 if (e.kind, e.reward) == (effects.OVER, "reward")]  # fmt: skip
    assert effect.what.endswith("(other seeds)")
    assert effect.every["seeds"] is None
    assert effect.every["posts"] is not None


# ---------------------------------------------------------------------- what is not compared


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"measured": {runs.REWARD_IS: "c", runs.PERPLEXITY_IS: "b"}}, "other evaluation reward, "),
        ({"measured": {runs.REWARD_IS: "a", runs.TOKENS_ARE: "64"}}, "other reference policy"),
        ({"last": 2}, "other last iteration (2, not 1)"),
    ],
)
def test_runs_that_are_measured_otherwise_are_not_compared(
    more: dict[str, Any], why: str, tmp_path: Path, report: Report
) -> None:
    one, other = run(tmp_path / "a", 1), run(tmp_path / "b", 1, "best")
    later = {0: other.start, 1: other.end, 2: other.end}
    other = run(tmp_path / "b", 1, "best", evaluations=later, **more)
    said, place = report([one, other])
    for name in POSTS:
        assert f"{name}: {other.name} is not compared with {one.name}: {why}" in said
    line = table(place / "table.csv")["valid", f"{other.title}, plain"]
    assert (line["compared"], line["distinct_1"]) == ("False", "")
    assert f"{other.title}, plain (not compared)" in said
    assert effects.OVER not in (place / "effects.csv").read_text()
    assert f"{other.title}, plain" not in (place / "length.svg").read_text()


def test_runs_of_other_posts_are_not_compared_on_that_set(tmp_path: Path, report: Report) -> None:
    one, other = run(tmp_path / "a", 1), run(tmp_path / "b", 1, "best")
    for row in itertools.chain(*other.evaluations.values()):
        row["prompt"] += "!" if row["set"] == "news" else ""
    said, place = report([one, other])
    assert f"news: {other.name} is not compared with {one.name}: other posts" in said
    assert "valid: " not in said
    kinds = table(place / "effects.csv")
    assert ("valid", effects.OVER) in kinds
    assert ("news", effects.OVER) not in kinds


def test_a_copy_is_no_other_seed(tmp_path: Path, report: Report) -> None:
    one, copy = run(tmp_path / "a", 1), run(tmp_path / "b", 1)
    said, place = report([one, copy])
    assert f"{copy.name}: left out: {one.name} is the same run, with the same seed" in said
    assert table(place / "table.csv")["valid", "ALT-RM, Excellent."]["seeds"] == "1"


# ---------------------------------------------------------------------- files


def test_latex_has_the_same_cells_and_nothing_that_it_would_read_otherwise(
    four: list[Run], report: Report, tmp_path: Path
) -> None:
    _, place = report(four)
    for name, count in (("table.tex", 2), ("effects.tex", 2)):
        text = (place / name).read_text()
        bodies = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.S)
        assert len(bodies) == count
        for columns, body in bodies:
            rows = [line for line in body.splitlines() if line != r"\hline"]
            assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
            assert all(row.endswith(r" \\") for row in rows)
            assert not re.search(r"(?<!\\)[_%#]", body)
    assert r"ppo\_50\%" in (place / "table.tex").read_text()
    assert r"$\pm$" in (place / "table.tex").read_text()
    if shutil.which("pdflatex"):
        _compiled((place / "table.tex").read_text() + (place / "effects.tex").read_text(), tmp_path)


def test_latex_shows_every_character_as_it_is(tmp_path: Path) -> None:
    text = tables.latex([["a_b %&#${}~^\\ <>|", "±1"]])
    wanted = r"a\_b \%\&\#\$\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} $<$$>$$|$"
    assert f"{wanted} & $\\pm$1 \\\\" in text
    if shutil.which("pdflatex"):
        _compiled(text, tmp_path)


def _compiled(text: str, place: Path) -> None:
    page_ = f"\\documentclass{{article}}\\begin{{document}}\n{text}\n\\end{{document}}\n"
    (place / "all.tex").write_text(page_)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_is_even_and_a_csv_gives_back_what_was_in_it(tmp_path: Path) -> None:
    cells = [["set", "x"], ['a, "b"\nc', "1.5"], ["d", ""]]
    (tmp_path / "t.csv").write_text(tables.as_csv(cells))
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == cells
    assert (
        len({len(line) for line in tables.aligned([["a", "b"], ["long", "1"]]).splitlines()}) == 1
    )
    assert tables.aligned([["a|b"], ["c"]]).splitlines()[0] == r"| a\|b |"
    assert tables.escaped("a_b _c_ *d* <e>\n|f|") == r"a_b \_c\_ \*d\* \<e\> \|f\|"


def test_the_page_has_pictures_and_examples_under_each_word(
    four: list[Run], report: Report
) -> None:
    said, place = report(four)
    text = (place / "report.md").read_text()
    for name in ("reward", "length", "words"):
        assert f"![{name}]({name}.png)" in text
        assert (place / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    best = picked(four[0], "best", "valid")[0]
    assert f"- **ALT-RM, Excellent.** (reward {best['reward']:.2f}): {best['text']}" in text
    assert text.count("### valid ") == 3
    assert "Horrible." in (place / "words.svg").read_text()  # text stays text
    assert str(place) in said
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    report(four)
    assert before == {file.name: file.read_bytes() for file in place.iterdir()}


def test_figures_with_too_little_behind_them_have_no_interval() -> None:
    its = figures.spread("reward", intervals.mean([{("valid", 0): 1.5}]))
    assert figures.within(its, "reward") == "1.500"
    assert figures.within(figures.spread("x", intervals.mean([])), "x") == "-"


# ---------------------------------------------------------------------- real runs


def also(other: Path) -> list[str]:
    """Settings that add a test set, and a policy that the run did not make."""
    return ["evaluate.test_prompts=3", f"evaluate.policies.ppo={{model: {other}}}"]


@pytest.fixture
def real(undisturbed: RunFolder, tiny_config: Path, tmp_path: Path) -> RunFolder:
    """A finished run of two iterations, with a test set and a policy that it did not make."""
    place = shutil.copytree(undisturbed.path, tmp_path / "one", symlinks=True)
    other = tiny.folder(tmp_path / "other", "gpt2")
    here.run(tiny_config, [f"run={place}", *also(other)])
    return RunFolder(place)


def as_another_seed(run: RunFolder, place: Path) -> RunFolder:
    """A copy that says of itself that it has another seed."""
    shutil.copytree(run.path, place, symlinks=True)
    copy = RunFolder(place)
    config = run.config().model_copy(update={"seed": run.config().seed + 1})
    facts = copy.facts() | {"frozen": config.frozen(), "fingerprint": config.fingerprint()}
    copy.layout.run.write_text(json.dumps(facts))
    copy.layout.config.write_text(json.dumps(config.model_dump(mode="json")))
    copy = RunFolder(place)
    for piece in copy.graph().pieces():
        if manifest := run.manifests.get(piece):
            its = replace(manifest, fingerprint=copy.manifests.fingerprint(piece))
            its.write(copy.layout.manifest(piece))
    return copy


@pytest.mark.faults
def test_real_runs_are_reported_alone_and_together(
    real: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one run what was said at its end comes first."""
    capsys.readouterr()
    assert main(["report", str(real.path)]) == 0
    said = capsys.readouterr().out
    assert "checkpoint   " in said
    assert said.rstrip().endswith(f"report  {real.path}/report")
    assert (real.path / "report/report.md").is_file()

    two = as_another_seed(real, tmp_path / "two")
    assert main(["report", str(real.path), str(two.path), "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("reward of 'Excellent.' minus 'Horrible.' after iteration 2: ") == 3
    assert "over seeds ±0.000; 6 posts, 2 seeds)" in said  # of two runs that are the same
    lines = table(tmp_path / "out/table.csv")
    own = [f"ALT-RM, {how}" for how in ("plain", "Excellent.", "Horrible.")]
    for name in ("valid", "test"):
        assert [row for of, row in lines if of == name] == ["start", "ppo", *own]
        seeds = [lines[name, row]["seeds"] for row in ("start", "ppo", *own)]
        assert seeds == ["1", "1", "2", "2", "2"]
        rows = results.picked(results.evaluated(real, 2), "best", name)
        reward = float(lines[name, own[1]]["reward"])
        assert reward == pytest.approx(np.mean([row["reward"] for row in rows]))
    draws = [real.draw(k)["rows"] for k in (1, 2)]
    assert float(lines["test", own[1]]["train_prompts"]) == len({*draws[0], *draws[1]})
    sampled = [json.loads(line) for k in (1, 2) for file in sorted(
        (real.path / f"iterations/{k:03d}/sample").glob("*/attempt-*/samples.jsonl"))
        for line in file.read_text().splitlines()]  # fmt: skip
    tokens = sum(len(g["ids"]) for row in sampled for g in row["generations"])
    assert float(lines["test", own[1]]["tokens_sampled"]) == tokens


def test_a_real_run_with_another_evaluation_reward_is_not_compared(
    real: RunFolder, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model in another folder is the same; other bytes in the same place are not."""
    judge = tmp_path / "judge"
    shutil.copytree(real.config().reward.named()["model"].name, judge)
    settings = [*also(tmp_path / "other"), f"measure.reward.model={judge}"]
    places = [shutil.copytree(real.path, tmp_path / name, symlinks=True) for name in ("b", "c")]
    here.run(tiny_config, [f"run={places[0]}", *settings])
    sizes = {"num_labels": 1, "num_hidden_layers": 2}
    tiny.folder(judge, "llama", transformers.AutoModelForSequenceClassification, **sizes)
    here.run(tiny_config, [f"run={places[1]}", *settings])
    capsys.readouterr()
    assert main(["report", str(real.path), *map(str, places)]) == 0
    said = capsys.readouterr().out
    not_compared = f"{places[1]} is not compared with {real.path}: other evaluation reward\n"
    assert f"valid: {not_compared}" in said
    assert f"test: {not_compared}" in said
    assert f"{places[0]}: left out: {real.path} is the same run, with the same seed" in said


def test_what_cannot_be_reported_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err

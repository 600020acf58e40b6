"""Rewards of a user's own: a Python function, a weighted sum, and the further columns they see."""

from __future__ import annotations

import datetime
import json
import math
import random
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from test_wrong_input import ROWS, write_rows
from transformers import AutoModelForSequenceClassification

from alt_hpc import config as configs
from alt_hpc.control import start
from alt_hpc.data import texts
from alt_hpc.errors import InputError
from alt_hpc.report import measures, results
from alt_hpc.rewards import Answers, AnyReward, File, Scored, function, total
from alt_hpc.run import code
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder

HEAD = '''"""Rewards of mine."""

import torch
import numpy as np


'''
LINE = HEAD.count("\n") + 1


def called(place: Path, body: str, texts: list[str] | None = None, **row: Any) -> list[float]:
    """What a function with this body gives for two answers."""
    file = place / "mine.py"
    file.write_text(f"{HEAD}def f(prompt, answers, row):\n    {body}\n")
    made = function.Function("mine.py", "f", File(file, file))
    (scored,) = made.score([Answers("post", texts or ["a", "bcd"], row, 17)])
    return list(scored.rewards)


@pytest.mark.parametrize(
    "body",
    [
        "return [len(a) for a in answers]",
        "return tuple(float(len(a)) for a in answers)",
        "yield from map(len, answers)",
        "return np.array([1, 3], dtype=np.float16)",
        "return torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)",
        "return [np.float32(1), torch.tensor(3)]",
        "return [True, np.int64(3)]",
        "return dict(zip('ab', map(len, answers))).values()",
    ],
)
def test_any_sequence_of_numbers_counts(tmp_path: Path, body: str) -> None:
    assert called(tmp_path, body) == [1.0, 3.0]


def test_a_function_sees_the_row_and_can_change_nothing(tmp_path: Path) -> None:
    body = "answers.clear(); return [row.pop('topic'), len(prompt)]"
    row = {"topic": 5}
    assert called(tmp_path, body, **row) == [5.0, 4.0]
    assert row == {"topic": 5}


@pytest.mark.parametrize("value", ["None", "np.nan", "float('inf')", "-np.inf", "10**400"])
def test_what_is_not_finite_sets_an_answer_aside(tmp_path: Path, value: str) -> None:
    aside, kept = called(tmp_path, f"return [{value}, 2]")
    assert not math.isfinite(aside)
    assert kept == 2.0


WRONG = {  # body -> (the line behind `def`, what is said)
    "return 1 / 0": (1, "f raised ZeroDivisionError: division by zero (row 17)"),
    "raise SystemExit(3)": (1, "f raised SystemExit: 3 (row 17)"),
    "yield 1 / 0": (1, "f raised ZeroDivisionError: division by zero (row 17)"),
    "return json.dumps(answers)": (1, "f raised NameError: name 'json' is not defined (row 17)"),
    "assert answers == 'a\\nb', 'a\\nb\\x07'": (1, "f raised AssertionError: a b\\x07 (row 17)"),
    "pass": (0, "f gave None, not a list of 2 rewards (row 17)"),
    "return 0.5": (0, "f gave a float, not a list of 2 rewards (row 17)"),
    "return np.float64(0.5)": (0, "f gave an array of 0 dimensions, not 2 rewards (row 17)"),
    "return np.zeros((2, 1))": (0, "f gave an array of 2 dimensions, not 2 rewards (row 17)"),
    "return {'a': 1, 'b': 2}": (0, "f gave a dict, not a list of 2 rewards (row 17)"),
    "return '12'": (0, "f gave a str, not a list of 2 rewards (row 17)"),
    "return [1]": (0, "f gave 1 reward for 2 answers (row 17)"),
    "return [1, 2, 3]": (0, "f gave 3 rewards for 2 answers (row 17)"),
    "while True: yield 1": (0, "f gave more than 2 rewards for 2 answers (row 17)"),
    "return [1, '2']": (0, "f gave a str for answer 2 of 2, not a number (row 17)"),
    "return [[1], [2]]": (0, "f gave a list for answer 1 of 2, not a number (row 17)"),
    "return [1, 2j]": (0, "f gave a complex for answer 2 of 2, not a number (row 17)"),
}


@pytest.mark.parametrize("body", WRONG)
def test_a_function_that_fails_is_one_sentence(tmp_path: Path, body: str) -> None:
    behind, said = WRONG[body]
    with pytest.raises(InputError) as error:
        called(tmp_path, body)
    assert str(error.value) == f"mine.py:{LINE + behind}: {said}"


def test_what_stands_beside_a_file_is_imported_and_stays_apart(tmp_path: Path) -> None:
    """Two folders have a helper of the same name; one is imported only when it is used."""
    made = []
    for number, late in enumerate((False, True)):
        place = tmp_path / str(number)
        (place / "words").mkdir(parents=True)
        (place / "words/__init__.py").write_text("")
        (place / "words/count.py").write_text(f"def count(text): return {number}\n")
        lines = ["from words.count import count", "def f(p, answers, row):"]
        lines = [lines[1], f"    {lines[0]}"] if late else lines
        lines += ["    return list(map(count, answers))"]
        (place / "mine.py").write_text("\n".join(lines))
        file = File(place / "mine.py", place / "mine.py")
        made.append(function.Function("mine.py", "f", file))
    before = [*sys.path]
    for _ in range(2):
        found = [next(iter(f.score([Answers("p", ["a"])]))).rewards for f in made]
        assert found == [[0.0], [1.0]]
    assert [one.beside.names() for one in made] == [["words"], ["words"]]
    assert "words" not in sys.modules
    assert sys.path == before


# ---------------------------------------------------------------------- sums


class Fixed:
    """A reward that gives what it was told."""

    def __init__(self, *rewards: list[float]) -> None:
        self.rewards = rewards

    def score(self, groups: Any) -> Any:
        for _, rewards in zip(groups, self.rewards, strict=True):
            yield Scored(rewards)


def test_a_sum_is_exact_where_parts_differ_by_a_million() -> None:
    rng = random.Random(0)
    parts = {"a": [], "b": [], "c": []}
    for _ in range(200):
        parts["a"].append(rng.gauss(0, 1e6))
        parts["b"].append(rng.gauss(0, 1))
        parts["c"].append(-parts["a"][-1] + rng.gauss(0, 1e-6))
    weights = {"a": 1.0, "b": 0.3, "c": 1.0}
    made = total.Total({name: Fixed(values) for name, values in parts.items()}, weights)
    (scored,) = made.score([Answers("p", ["x"] * 200)])
    exact = [
        sum((Fraction(w * v) for w, v in zip(weights.values(), each, strict=True)), Fraction())
        for each in zip(*parts.values(), strict=True)
    ]
    assert list(scored.rewards) == [float(value) for value in exact]
    assert scored.parts == parts


def test_a_sum_without_a_part_is_set_aside() -> None:
    nan, inf, big = math.nan, math.inf, 1.7e308
    parts = {"a": Fixed([nan, inf, 1.0, big, 2.0]), "b": Fixed([1.0, -inf, nan, big, 3.0])}
    (scored,) = total.Total(parts, {"a": 0.0, "b": 2.0}).score([Answers("p", ["x"] * 5)])
    assert [math.isnan(reward) for reward in scored.rewards] == [True, True, True, True, False]
    assert scored.rewards[4] == 6.0


def test_a_part_that_rules_is_named() -> None:
    rows = [
        {"parts": {"quality": [0.0, 2e6], "brevity": [1.0, 2.0], "c": [5, 5]}},
        {"parts": {"quality": [1.0, None], "brevity": [99, 99], "c": [9, 9]}},
    ]
    weights = {"quality": 1.0, "brevity": -0.5, "c": 1e9}
    found = measures.spreads([[row] for row in rows], weights.__getitem__)
    assert found["c"] == {"mean": 7.0, "spread": 0.0}
    assert found["brevity"] == {"mean": 50.25, "spread": pytest.approx(0.5 * 0.125**0.5)}
    ratio = (2 / 3) ** 0.5 * 1e6 / (0.5 * 0.125**0.5)
    words = f"its weighted spread is {ratio:,.0f} times that of brevity"
    assert measures.ruling(found) == f"reward: quality alone decides the order: {words}"
    assert measures.ruling({name: found[name] for name in ("brevity", "c")}).endswith("all answers")
    assert measures.ruling({"a": {"spread": 99.0}, "b": {"spread": 1.0}}) == ""
    assert measures.ruling({"a": {"spread": 99.0}}) == ""
    together = measures.spreads([rows], weights.__getitem__)
    assert together["c"]["spread"] == 2e9


# ---------------------------------------------------------------------- further columns


def _data(place: Path, **more: Any) -> configs.Config:
    prompts = {"path": str(place), "valid": "train", **more}
    values = {"run": "x", "policy": {"model": "p"}, "reward": {"model": "r"}}
    return configs.from_json({**values, "data": {"prompts": prompts}}, "test")


def _read(config: configs.Config) -> list[dict[str, Any]]:
    one = next(texts.wanted(config))
    found = texts.read(one.source, one.split, one.columns, one.field)
    return [config.domain.example(row) for row in found]


def test_further_columns_of_json_lines_are_kept(tmp_path: Path) -> None:
    rows = [
        {"post": "a", "summary": 5, "topic": "cats", "tags": [1, None, {"x": 2.5}], "prompt": "no"},
        {"post": "b", "label": "of another", "topic": None, "score": math.nan, "half": "\ud83d"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _read(_data(tmp_path, columns={"prompt": "post", "label": "summary"})) == [
        {"topic": "cats", "tags": [1, None, {"x": 2.5}], "label": 5, "prompt": "a"},
        {"topic": None, "label": "of another", "score": None, "prompt": "b"},
    ]


def test_further_columns_of_parquet_are_kept(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    day = datetime.date(2024, 2, 29)
    columns = {"prompt": ["a"], "when": [day], "price": [Decimal("1.10")], "raw": [b"\xff"]}
    columns |= {"topic": [{"name": "cats", "days": [day]}], "score": [0.1]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    assert _read(_data(tmp_path)) == [
        {
            **{"prompt": "a", "when": "2024-02-29", "price": "1.10", "score": 0.1},
            "topic": {"name": "cats", "days": ["2024-02-29"]},
        }
    ]


def test_only_summaries_are_asked_how_they_begin(tmp_path: Path) -> None:
    rows = [{"prompt": "p\n", "label": "TL;DR: x", "topic": "cats"}, {"prompt": "p", "topic": "x"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _read(_data(tmp_path)) == [
        {"prompt": "p\nTL;DR:", "label": " x", "topic": "cats"},
        {"prompt": "p", "topic": "x"},
    ]


# ---------------------------------------------------------------------- wrong input

MINE = """import helper


number = 3


def few(prompt, answers):
    return []


def brevity(prompt, answers, row):
    return [helper.length(a) for a in answers]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    tiny.folder(place / "policy", "llama")
    tiny.folder(place / "judge", "llama", AutoModelForSequenceClassification, num_labels=1)
    return place


@pytest.fixture
def good(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A good config with a sum of a model and a function; the test stands in its folder."""
    (tmp_path / "rows").mkdir()
    for split in ("train", "valid"):
        write_rows(tmp_path, ROWS, split)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("def length(text):\n    return -len(text)\n")
    (tmp_path / "broken.py").write_text("x = 1\n\ndef f(:\n")
    (tmp_path / "raises.py").write_text("import helper\n\nimport no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    return {
        "run": str(tmp_path / "run"),
        "policy": {"model": str(models / "policy")},
        "reward": {
            "kind": "total",
            "parts": {
                "model": {"model": str(models / "judge")},
                "brevity": {"kind": "function", "function": "mine.py:brevity"},
            },
            "weights": {"brevity": 0.2},
        },
        "data": {"prompts": {"path": str(tmp_path / "rows")}},
        "sample": {"prompts": 4, "generations": 5},
        "evaluate": {"prompts": 2},
    }


def prepared(config: dict[str, Any]) -> RunFolder:
    """As the command line does: an error has the line of the config."""
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    try:
        return start.prepare(configs.load(path))
    except InputError as error:
        raise configs.located(error, path, []) from None


def calls(name: str) -> Any:
    return lambda reward: reward["parts"]["brevity"].update(function=name)


def part(**values: Any) -> Any:
    return lambda reward: reward["parts"]["model"].update(values)


UNTRAINED = {"kind": "model", "base": "b"}
SUM = {  # what is spoilt of the reward -> what the sentence names
    "no file": (calls("gone.py:f"), ["brevity.function: gone.py: no such file"]),
    "no name": (calls("mine.py"), ["brevity.function: expected FILE.py:NAME, not 'mine.py'"]),
    "no Python file": (calls("mine.txt:f"), ["function: expected FILE.py:NAME"]),
    "no valid Python": (calls("broken.py:f"), ["function: broken.py:3: not valid Python"]),
    "no import": (
        calls("raises.py:f"),
        ["function: raises.py:3: cannot be imported: ModuleNotFoundError", "'no_such_thing'"],
    ),
    "no function": (calls("mine.py:brief"), ["mine.py: no function 'brief'", "few, brevity"]),
    "a number": (calls("mine.py:number"), ["mine.py:4: number is an int, not a function"]),
    "two arguments": (calls("mine.py:few"), ["mine.py:7: few cannot take three arguments"]),
    "no parts": (lambda reward: reward.update(parts={}, weights={}), ["reward.parts: give one"]),
    "parts left out": (lambda reward: reward.pop("parts"), ["'parts' is missing"]),
    "a weight of none": (
        lambda reward: reward.update(weights={"brief": 1}),
        ["config.yaml:13: reward.weights.brief: no part", "model, brevity"],
    ),
    "an infinite weight": (
        lambda reward: reward.update(weights={"brevity": math.inf}),
        ["reward.weights.brevity: expected a number"],
    ),
    "a part that is no kind": (
        part(kind="modle"),
        ["config.yaml:9: reward.parts.model.kind", "model"],
    ),
    "a key of a part": (
        part(maxlength=9),
        ["config.yaml:9: reward.parts.model.maxlength: unknown key", "'max_length'"],
    ),
    "a value of a part": (
        part(max_length="x"),
        ["config.yaml:9: reward.parts.model.max_length: expected a whole"],
    ),
    "a name with a dot": (
        lambda reward: reward["parts"].update({"a.b": {"model": "x"}}),
        ["'a.b' cannot be a name"],
    ),
    "no model": (part(model="gone"), ["config.yaml:8: reward.parts.model.model:", "gone"]),
    "two to train": (
        lambda reward: reward.update(parts={"a": UNTRAINED, "b": UNTRAINED}, weights={}),
        ["one reward model, not reward.parts.a and reward.parts.b"],
    ),
    "one to train": (
        lambda reward: reward.update(parts={"a": {"kind": "model"}}, weights={}),
        ["reward.parts.a.model: give reward.parts.a.model, or reward.parts.a.base"],
    ),
    "a sum in a sum": (
        lambda reward: reward.update(parts={"a": {**reward, "weights": {"x": 1}}}, weights={}),
        ["reward.parts.a.weights.x: no part is called 'x'"],
    ),
}


@pytest.mark.parametrize("case", SUM)
def test_wrong_rewards_end_in_one_sentence(good: dict[str, Any], case: str) -> None:
    spoil, named = SUM[case]
    spoil(good["reward"])
    if case == "two to train":
        good |= {"reward_model": {}, "data": {**good["data"], "comparisons": {"path": "x"}}}
    with pytest.raises(InputError) as error:
        prepared(good)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    assert said.startswith("config.yaml:")
    for words in named:
        assert words in said, said
    assert not Path("run").exists()


def test_measures_of_ones_own_are_named_too(good: dict[str, Any]) -> None:
    good["measure"] = {"reward": {"kind": "function", "function": "gone.py:f"}}
    with pytest.raises(InputError, match=r"measure\.reward\.function: gone\.py: no such file"):
        prepared(good)
    good["measure"] = {"reward": {"kind": "total", "parts": {"a": UNTRAINED}}}
    with pytest.raises(InputError, match=r"measure\.reward\.parts\.a\.model: give the model"):
        prepared(good)


# ---------------------------------------------------------------------- copies


def loaded(run: RunFolder) -> function.Function:
    reward = run.config().reward.singles()[".parts.brevity"]
    assert isinstance(reward, function.Settings)
    (name,) = reward.files().values()
    return function.Function(*reward.split, code.user_file(run, name))


def test_a_run_goes_on_with_its_copy(
    good: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = prepared(good)
    prepared(good)
    assert capsys.readouterr().err == ""
    (tmp_path / "mine.py").write_text("x = 1\n")
    prepared(good)  # the copy is still good
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"reward.parts.brevity.function: {tmp_path}/mine.py is not what it was")
    monkeypatch.chdir("/")
    again = RunFolder(run.path)
    (scored,) = loaded(again).score([Answers("p", ["ab"], number=3)])
    assert scored.rewards == [-2.0]  # its helper is found where it was
    with pytest.raises(InputError, match=r"^mine\.py:12: brevity raised TypeError: .* \(row 3\)$"):
        list(loaded(again).score([Answers("p", [3], number=3)]))  # type: ignore[list-item]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "late.py").write_text("def f(p, answers, row):\n    return [1] * len(answers)\n")
    good["measure"] = {"reward": {"kind": "function", "function": "late.py:f"}}
    prepared(good)
    (tmp_path / "late.py").unlink()
    assert code.user_file(again, "late.py").kept.is_file()
    capsys.readouterr()
    prepared(good)
    assert "late.py is not what it was when it was copied" in capsys.readouterr().err
    code.user_file(again, "mine.py").kept.write_text("x = 2\n")
    with pytest.raises(InputError, match="the run's copy was changed"):
        prepared(good)


# ---------------------------------------------------------------------- a whole run


def test_a_run_for_a_sum_of_a_model_and_a_function(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load(tiny_config.read_text())["data"]["prompts"]["path"]
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = (Path(data) / f"{split}.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "topic": i, "more": [i]} for i, line in enumerate(lines)]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "mine.py").write_text(
        "import helper\n\ndef f(prompt, answers, row):\n"
        "    assert row['more'] == [row['topic']] and row['prompt'] == prompt\n"
        "    found = [helper.scaled(len(set(a)) + row['topic']) for a in answers]\n"
        "    return [None, *found[1:]] if len(answers) == 6 else found\n"
    )
    (tmp_path / "helper.py").write_text("def scaled(x):\n    return x * 1e6\n")
    model = yaml.safe_load(tiny_config.read_text())["reward"]
    parts = {"quality": model, "variety": {"kind": "function", "function": "mine.py:f"}}
    reward = {"kind": "total", "parts": parts, "weights": {"quality": 0.001}}
    overrides = [f"reward={json.dumps(reward)}", f"run={tmp_path}/run", "cluster.backend=local"]
    overrides += [f"data.prompts.path={tmp_path}/data", "cluster.train={nodes: 1}"]
    assert start.run(configs.load(tiny_config, overrides)) == 0

    run = RunFolder(tmp_path / "run")
    posts = rows_of.frozen(run, "prompts-train")
    samples = rows_of.of_stage(run, 2, "sample")
    for row, sample in zip(rows_of.of_stage(run, 2, "score"), samples, strict=True):
        post = posts[row["post"]]
        assert post["prompt"] == sample["prompt"]
        assert row["rewards"][0] is row["quantiles"][0] is row["parts"]["variety"][0] is None
        for i in range(1, 6):
            text = sample["generations"][i]["text"]
            assert row["parts"]["variety"][i] == (len(set(text)) + post["topic"]) * 1e6
            values = [0.001 * row["parts"]["quality"][i], row["parts"]["variety"][i]]
            assert row["rewards"][i] == math.fsum(values)
    held_out = rows_of.frozen(run, "prompts-valid")
    answers = [row for row in results.evaluated(run, 2) if row["set"] == "valid"]
    best = results.picked(answers, "best", "valid")
    assert [row["prompt"] for row in best] == [row["prompt"] for row in held_out]
    for row in answers:
        post = held_out[row["row"]]
        assert row["parts"]["variety"] == (len(set(row["text"])) + post["topic"]) * 1e6
    report = results.reports(run)[2]
    quality = [row["parts"]["quality"] for row in best]
    assert report["evaluation"]["valid"]["best"]["reward_quality"] == pytest.approx(
        sum(quality) / len(quality)
    )
    assert report["answers_set_aside"] == 12
    assert set(report["parts"]["variety"]) == {"mean", "spread"}
    table = run.layout.table.read_text()
    assert "answers set aside, without a finite reward: 12 in iteration 1, 12 in iter" in table
    assert "reward: variety alone decides the order: its weighted spread is " in table
    logs = "".join(file.read_text() for file in run.layout.jobs.rglob("*log.out"))
    assert f"mine.py imports helper from {tmp_path}: not kept in the run" in logs
    assert "4 of 24 answers set aside (no finite reward)" in logs

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.layout.tensorboard / "iterations"))
    tags = set(events.Reload().Tags()["scalars"])
    assert {"valid-best/reward_quality", "reward-parts/variety_spread"} <= tags


def test_a_part_that_the_run_trains(tiny_config: Path) -> None:
    """Where it stands within the sum, whatever its name."""
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(AnyReward)
    parts = {"a": {"model": "x"}, "b": {"base": "y", "tokenizer": "z"}}
    made = adapter.validate_python({"kind": "total", "parts": parts})
    assert made.trained
    assert [*made.to_train()] == [".parts.b"]
    assert [*made.named()] == ["parts.a.model", "parts.b.base", "parts.b.tokenizer"]
    assert adapter.validate_python(made.model_dump(mode="json")) == made

"""Judges: an endpoint that misbehaves, a model within the task, the whole stage, what it costs."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import here
import numpy as np
import pytest
import tiny
import torch
import yaml
from endpoint import MODEL, Late, Raw, Served, Status, serving
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_readme import example

from alt_hpc import config as configs
from alt_hpc import interrupt, judges
from alt_hpc.__main__ import main
from alt_hpc.config import rules
from alt_hpc.config.schema import FREE, Evaluate
from alt_hpc.control import start
from alt_hpc.engines import Generator, exact
from alt_hpc.errors import InputError
from alt_hpc.graph import JUDGE, WIN_RATES, Piece
from alt_hpc.judges import Given, Judge, Question, Reply, compare
from alt_hpc.judges import endpoint as endpoints
from alt_hpc.judges import model as judges_model
from alt_hpc.lm import load
from alt_hpc.lm.tokens import Generation
from alt_hpc.report import page, results
from alt_hpc.run import asked as asked_of
from alt_hpc.run import rows as run_rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submit
from alt_hpc.stages.work import unload

SECRET = "sk-a-secret-that-must-stand-nowhere"
VARIABLE = "ALT_HPC_TESTS_KEY"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are a hundredth of what they are."""
    real = endpoints._wait
    monkeypatch.setattr(endpoints, "_wait", lambda number, told: real(number, told) / 100)
    monkeypatch.setenv(VARIABLE, SECRET)


# ---------------------------------------------------------------------- an endpoint, alone


class Spent:
    """A purse, and what was kept."""

    def __init__(self) -> None:
        self.held, self.kept = dict[str, float](), dict[Question, Reply]()

    def hold(self, dollars: float) -> str:
        self.held[name := str(len(self.held))] = dollars
        return name

    def settle(self, held: str, dollars: float) -> None:
        self.held[held] = dollars


def settings(url: str, **more: Any) -> endpoints.Settings:
    given = {"base_url": url, "model": MODEL, "key_from": VARIABLE, "budget": 1.0}
    price = {"dollars_in": 1.0, "dollars_out": 10.0}
    return endpoints.Settings(**{"kind": "endpoint", **given, **price, **more})


def asker(judge: Judge, purse: Spent) -> judges.Asker:
    def keep(question: Question, reply: Reply) -> None:
        purse.kept[question] = reply

    cpu = torch.device("cpu")
    return judge.load(Given(lambda _: Path(judge.model), lambda: cpu, purse.kept.get, keep, purse))


def questions(count: int) -> list[Question]:
    return [Question(f"question {i}", i, 20) for i in range(count)]


def test_replies_come_in_order_whatever_the_server_does() -> None:
    """Each question fails once in another way, and is answered at the second try."""
    limited = Status(429)
    limited.wait = "1"
    failures = [
        limited,
        Status(500),
        Status(503),
        Raw('{"choices": [{"mess'),
        Late(0.6),
        Raw("<html>"),
    ]
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def say(text: str, number: int) -> Any:
        with lock:
            seen[text] = seen.get(text, 0) + 1
            if seen[text] == 1:
                return failures[int(text.split()[1]) % len(failures)]
        return f"{text}, answered"

    purse = Spent()
    with serving(say, SECRET) as served:
        found = list(
            asker(settings(served.url, timeout_s=0.3, at_once=3), purse).ask(questions(12))
        )
    assert [reply.text for reply in found] == [f"question {i}, answered" for i in range(12)]
    assert len(served.asked) == 24
    assert {one["model"] for one in served.asked} == {MODEL}
    paid = (100 * 1.0 + 10 * 10.0) / 1e6  # of a request that was answered, by its usage
    for i, reply in enumerate(found):
        unknown = i % 6 > 2  # whether the server has made what did not come through
        assert reply.dollars == pytest.approx(paid, rel=1e-9) or unknown
        assert (reply.dollars > paid) == unknown
    assert sum(purse.held.values()) == pytest.approx(sum(reply.dollars for reply in found))


def test_a_question_that_is_refused_or_never_answered_is_told_apart() -> None:
    def say(text: str, number: int) -> Any:
        how = {0: {"content": None, "refusal": "No."}, 1: Status(400), 2: Status(500), 4: ""}
        return how.get(int(text.split()[1]), "x" * 50_000)

    purse = Spent()
    with serving(say, SECRET) as served:
        found = list(asker(settings(served.url, tries=2), purse).ask(questions(5)))
    assert [reply.text for reply in found] == ["", None, None, "x" * 50_000, ""]
    assert [reply.why for reply in found][:2] == ["refused", found[1].why]
    assert found[1].why.startswith("HTTP 400")
    assert found[2].why.startswith("HTTP 500")
    assert len(served.asked) == 6
    assert len(purse.kept) == 3  # another attempt may have more luck with the others


def test_a_request_that_some_models_refuse_can_be_changed() -> None:
    """Refused three times in a row it is wrong input: no try mends that."""
    with serving(lambda *_: Status(400), SECRET) as served:
        with pytest.raises(InputError, match=r"refuses what it is asked \(HTTP 400"):
            list(asker(settings(served.url, at_once=1), Spent()).ask(questions(9)))
        assert len(served.asked) == 3
    with serving(lambda *_: "yes", SECRET) as served:
        other = {"max_tokens": None, "temperature": None, "max_completion_tokens": 99}
        list(asker(settings(served.url, request=other), Spent()).ask(questions(1)))
        assert served.asked[0].keys() == {"model", "messages", "seed", "max_completion_tokens"}


def test_an_endpoint_that_answers_nothing_is_an_error_that_may_go_away() -> None:
    with serving(lambda *_: Status(503), SECRET) as served:
        with pytest.raises(RuntimeError, match="does not answer: HTTP 503"):
            list(asker(settings(served.url, tries=2, at_once=1), Spent()).ask(questions(9)))
        assert len(served.asked) == 6


def test_a_key_that_is_refused_is_final_and_not_repeated() -> None:
    with serving(lambda *_: "hello", "another") as served:
        with pytest.raises(InputError, match="refuses the key") as caught:
            list(asker(settings(served.url), Spent()).ask(questions(1)))
        assert SECRET not in str(caught.value)
        with pytest.raises(InputError, match="refuses the key"):
            settings(served.url).check(Path)


def test_a_server_that_repeats_the_key_does_not_get_it_written_down() -> None:
    purse = Spent()
    with serving(lambda *_: f"Your key is {SECRET}.", SECRET) as served:
        list(asker(settings(served.url), purse).ask(questions(1)))
    (reply,) = purse.kept.values()
    assert reply.text == "Your key is (key)."


def test_what_was_answered_is_not_asked_again() -> None:
    purse = Spent()
    with serving(lambda text, _: text.upper(), SECRET) as served:
        judge = asker(settings(served.url), purse)
        assert len(list(judge.ask(questions(4)))) == 4
        found = list(judge.ask(questions(6)))
        assert len(served.asked) == 6
    assert [reply.text for reply in found] == [f"QUESTION {i}" for i in range(6)]


def test_further_tries_are_sampled_with_seeds_of_their_own() -> None:
    """A reply that cannot be read is asked for again, and only that."""

    def say(text: str, number: int) -> str:
        return "yes" if text == "question 0" or number > 4 else "hm"

    with serving(say, SECRET) as served:
        judge = asker(settings(served.url, at_once=1), Spent())
        found = judges.answers(judge, questions(3), lambda t: t if t == "yes" else None, 3)
    assert [answer.value for answer in found] == ["yes"] * 3
    assert [len(answer.replies) for answer in found] == [1, 3, 2]
    how = [(one["temperature"], one["seed"]) for one in served.asked]
    assert how[:3] == [(0.0, 0), (0.0, 1), (0.0, 2)]
    assert {temperature for temperature, _ in how[3:]} == {0.7}
    assert how[3:] == [(0.7, 2), (0.7, 3), (0.7, 3)]


def test_a_judge_is_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk of questions after the other, each with a failure that goes away."""

    def say(text: str, number: int) -> Any:
        return "yes" if number % 2 else Status(500)

    with serving(say, SECRET) as served:
        judge = asker(settings(served.url, at_once=2), Spent())
        for chunk in range(3):
            some = [Question(f"{chunk}, {i}", i, 20) for i in range(4)]
            found = judges.answers(judge, some, lambda text: text, 1)
            assert [answer.value for answer in found] == ["yes"] * 4


def test_a_server_that_is_gone_costs_nothing() -> None:
    with serving(lambda *_: "yes", SECRET) as served:
        pass
    purse = Spent()
    with pytest.raises(RuntimeError, match="does not answer"):
        list(asker(settings(served.url, tries=2), purse).ask(questions(4)))
    assert purse.held
    assert sum(purse.held.values()) == 0


def test_a_task_that_is_asked_to_stop_waits_for_no_answer_but_those_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for no further try, and what was on its way is kept."""
    monkeypatch.setattr(endpoints, "_wait", lambda number, told: 60.0)

    def say(text: str, number: int) -> Any:
        monkeypatch.setattr(interrupt, "asked", lambda: True)
        return "yes" if text == "question 1" else Status(503)

    purse = Spent()
    with serving(say, SECRET) as served:
        with pytest.raises(interrupt.Interrupted):
            list(asker(settings(served.url, at_once=2), purse).ask(questions(6)))
        assert 2 <= len(served.asked) <= 3
    assert [question.text for question in purse.kept] == ["question 1"]


def test_requests_keep_their_distance() -> None:
    import time

    with serving(lambda *_: "yes", SECRET) as served:
        judge = asker(settings(served.url, requests_per_minute=600), Spent())
        began = time.monotonic()
        list(judge.ask(questions(6)))
        assert time.monotonic() - began > 0.49


# ---------------------------------------------------------------------- what it may cost


def test_a_ledger_counts_over_processes_and_what_was_never_settled(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first, second = (asked_of.Ledger(run, "judge.judge", 1.0) for _ in range(2))
    held = first.hold(0.6)
    with pytest.raises(InputError, match=r"judge.judge.budget: 0.6000 of 1 dollars"):
        second.hold(0.5)
    first.settle(held, 0.1)
    second.hold(0.5)  # its process dies
    assert first.spent() == pytest.approx(0.6)
    with pytest.raises(InputError, match="budget"):
        asked_of.Ledger(run, "judge.judge", 1.0).hold(0.5)
    asked_of.Ledger(run, "judge.judge", 2.0).hold(0.5)  # there is more now


# ---------------------------------------------------------------------- a model in the task


class Scripted:
    """An engine that answers by a function of the text that the model was given."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say, self.words, self.asked = say, tiny.tokenizer(), list[str]()

    def sample(self, groups: Any, decoding: Any) -> Iterator[Any]:
        for group in groups:
            made = []
            for ask in group:
                self.asked.append(str(self.words.decode(ask.ids)))
                ids = self.words.encode(self.say(self.asked[-1]))[: decoding.max_new_tokens]
                made.append([Generation([*ids, tiny.EOS], "eos")])
            yield made


def in_task(monkeypatch: pytest.MonkeyPatch, say: Callable[[str], str]) -> Scripted:
    """The engine that runs a model in a folder `judge`, scripted; that of policies is ours."""
    engine, real = Scripted(say), exact.Settings.load

    def load(self: exact.Settings, model: Any) -> Generator:
        its = model.place.name == "judge"
        return Generator(True, engine.sample) if its else real(self, model)

    monkeypatch.setattr(exact.Settings, "load", load)
    return engine


def shown(text: str) -> tuple[str, str]:
    """The two texts of a question."""
    a, b = text.split("Summary A:\n")[1].split("\n\nSummary B:\n")
    return a, b.split("\n\nAnswer in two lines.")[0]


def says_longer(text: str) -> str:
    a, b = shown(text)
    return f"Comparison: one is longer.\nPreferred: {'A' if len(a) > len(b) else 'B'}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that judges, and comparisons: of 40 pairs the better one is the longer in 24."""
    place = tmp_path_factory.mktemp("judging")
    tiny.folder(place / "judge", "tied", max_position_embeddings=8192)
    rows = []
    for i in range(40):
        good = "it is good " * (4 if i % 5 < 3 else 1)
        pair = {"chosen": good, "rejected": "this is bad this is bad"}
        rows.append(json.dumps({"prompt": f"POST: number {i // 2}\nTL;DR:", **pair}) + "\n")
    for split in ("train", "valid"):
        (place / f"{split}.jsonl").write_text("".join(rows))
    return place


@pytest.fixture(scope="module")
def trained(
    place: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, list[str]]:
    """A run of one iteration that knows no judge yet, and its settings."""
    kept = tmp_path_factory.mktemp("judged") / "run"
    given = ["iterations=1", "evaluate.references=true", "evaluate.drawn={posts: 0}"]
    given.append(f"data.comparisons={{path: {place}}}")
    here.run(tiny_config, [*given, f"run={kept}"])
    return RunFolder(kept), given


GoOn = Callable[..., RunFolder]


@pytest.fixture
def judged(trained: tuple[RunFolder, list[str]], tiny_config: Path, tmp_path: Path) -> GoOn:
    """The run goes on with a judge."""
    shutil.copytree(trained[0].path, tmp_path / "run", symlinks=True)

    def go_on(judge: dict[str, Any], *more: str) -> RunFolder:
        own = [f"run={tmp_path}/run", f"judge={json.dumps({'posts': 5, **judge})}"]
        RunFolder(tmp_path / "run").journal.record(Submit(who="me", cluster=""))
        here.run(tiny_config, [*trained[1], *own, *more])
        return RunFolder(tmp_path / "run")

    return go_on


def figures(run: RunFolder, k: int) -> dict[str, Any]:
    return dict(run.manifests.open(Piece(k, WIN_RATES))[1].facts)


def model(place: Path) -> dict[str, Any]:
    return {"kind": "model", "model": str(place / "judge"), "dtype": "float32"}


def test_a_judge_in_the_task_is_asked_in_both_orders(
    judged: GoOn, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that always names the first: nothing is won, and it cannot judge."""
    engine = in_task(monkeypatch, lambda text: "Comparison: alike.\nPreferred: A")
    run = judged({"judge": model(place)}, "cluster.judge.shards=2")
    pieces = run.graph().of(1, JUDGE)
    assert [run.graph().shard(piece).policy for piece in pieces] == [  # type: ignore[union-attr]
        *["best over start"] * 2,
        *["best over references"] * 2,
    ]
    assert len(engine.asked) == 2 * (2 * 5 + 40)
    found = figures(run, 1)["pairs"]["best over start"]
    assert (found["rate"], found["bias"], found["posts"]) == (0.5, 1.0, 5)
    rows = list(run_rows.of_stage(run, 1, JUDGE))
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4] * 2
    assert {(row["first"], row["second"]) for row in rows} == {(1.0, 0.0)}
    texts = {text: shown(text) for text in engine.asked}
    assert all(tuple(reversed(two)) in texts.values() for two in texts.values())
    assert not any("TL;DR:\n\nSummary A" in text for text in texts)
    table = run.layout.table.read_text()
    assert "win rate of best over start after iteration 1: cannot judge this (right on" in table
    assert "right on 50.0% of 40 held-out comparisons" in table
    assert "the longer one 60.0%" in table


def test_a_judge_that_prefers_the_longer_text_is_no_better_than_the_length_rule(
    judged: GoOn, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_task(monkeypatch, says_longer)
    run = judged({"judge": model(place)})
    found = figures(run, 0)["judge"]
    assert found["judge"]["rate"] == found["length"]["rate"] == pytest.approx(0.6)
    assert found["cannot"]
    table = run.layout.table.read_text()
    assert "cannot judge this" in table
    rewards = [row["rewards"] for row in run_rows.of_piece(run, Piece(0, JUDGE))]
    right = sum(a > b for a, b in rewards) / 40
    assert f"the longer one 60.0%, the reward model {right:.1%})" in table


def test_a_good_judge_gives_a_win_rate(
    judged: GoOn, place: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the better one of people's, and of two others prefers the one that sorts first."""

    def say(text: str) -> str:
        a, b = shown(text)
        first = a.startswith("it is good") if "number" in text else a <= b
        return f"Preferred: {'A' if first else 'B'}\nComparison: it is better."

    engine = in_task(monkeypatch, say)
    run = judged(
        {"judge": model(place), "pairs": [["best", "references"], ["references", "start"]]}
    )
    assert figures(run, 0)["judge"]["judge"]["rate"] == 1.0
    assert [*figures(run, 0)["pairs"]] == ["references over start"]
    found = figures(run, 1)["pairs"]["best over references"]
    (piece,) = run.graph().of(1, JUDGE)
    answers = {name: dict[int, str]() for name in ("best", "references")}
    for k, name, wanted in (
        (1, "best", ("own", "best")),
        (0, "references", ("references", "asked")),
    ):
        for row in results.evaluated(run, k):
            if (row["policy"], row["variant"], row["set"]) == (*wanted, "valid"):
                answers[name][row["row"]] = row["text"]
    wins = [1.0 if answers["best"][i] < answers["references"][i] else 0.0 for i in range(5)]
    assert found["rate"] == pytest.approx(sum(wins) / 5)
    for row, won in zip(run_rows.of_piece(run, piece), wins, strict=True):
        assert (row["first"], row["second"]) == (won, won)
        assert row["longer"] == len(answers["best"][row["row"]]) - len(
            answers["references"][row["row"]]
        )
    table = run.layout.table.read_text()
    assert re.search(r"win rate of best over references after iteration 1: \d\.\d\d \(95 %", table)
    assert "win rate of references over start: " in table
    # more posts, and another pair: what was asked is not asked again
    before = len(engine.asked)
    more = {"judge": model(place), "pairs": [["best", "references"], ["best", "start"]]}
    judged(more)
    run = judged({**more, "posts": 6})
    assert len(engine.asked) - before == 2 * (5 + 1 + 1)
    assert [one["posts"] for one in figures(run, 1)["pairs"].values()] == [6, 6]


def test_a_post_too_long_for_the_judge_loses_its_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_task(monkeypatch, lambda text: "Preferred: A")
    judge = judges_model.Settings(kind="model", model=str(place / "judge"), max_length=1500)
    purse = Spent()
    loaded = asker(judge, purse)

    def make(post: str) -> Question:
        return Question(compare.filled(compare.PROMPT, post, "one", "two"), 1, 50)

    question, shortened = judges.fitted(loaded, "word " * 10_000, make)
    assert shortened
    assert len(question.text.encode()) == 1450
    too_long = Question("x" * 1451, 1, 50)
    first, second = loaded.ask([too_long, question])
    assert (first.text, first.why) == (None, "1 tokens too long")
    assert second.text == "Preferred: A"
    assert len(engine.asked) == 1


def test_a_chat_model_is_asked_as_a_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = in_task(monkeypatch, lambda text: "yes")
    real = load.tokenizer

    def tokenizer(folder: Path) -> Any:
        its = real(folder)
        its.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
        return its

    monkeypatch.setattr(load, "tokenizer", tokenizer)
    judge = judges_model.Settings(kind="model", model=str(place / "judge"))
    list(asker(judge, Spent()).ask([Question("better?", 1, 5)]))
    assert engine.asked == ["<user>better?<bot>"]


# ---------------------------------------------------------------------- the stage, an endpoint


def of(served: Served, **more: Any) -> dict[str, Any]:
    return settings(served.url, **more).model_dump(mode="json")


def test_an_endpoint_judges_and_its_key_stands_nowhere(judged: GoOn) -> None:
    with serving(lambda text, _: says_longer(text), SECRET) as served:
        run = judged({"judge": of(served), "pairs": [["best", "references"]]})
        assert len(served.asked) == 2 * (5 + 40)
    facts = [
        run.manifests.open(piece)[1].facts for k in (0, 1) for piece in run.graph().of(k, JUDGE)
    ]
    paid = sum(fact["dollars"] for fact in facts)
    assert paid == pytest.approx(90 * 200 / 1e6)
    ledger = asked_of.Ledger(run, "judge.judge", 1.0)
    assert ledger.spent() == pytest.approx(paid)
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert len(files) > 50
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_killed_shard_asks_nothing_twice(judged: GoOn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after 33 replies, in the midst of a chunk of posts; then again after 20 more."""
    real, kept = asked_of.Replies.keep, list[str]()

    def keep(self: asked_of.Replies, question: Question, reply: Reply) -> None:
        real(self, question, reply)
        kept.append(question.text)
        if len(kept) in (33, 53):
            raise RuntimeError("killed")

    monkeypatch.setattr(asked_of.Replies, "keep", keep)
    with serving(lambda text, _: says_longer(text), SECRET) as served:
        judge = {"judge": of(served, at_once=1), "pairs": [["best", "references"]]}
        for _ in range(2):
            with pytest.raises(RuntimeError, match="killed"):
                judged(judge)
        run = judged(judge)
        assert len(served.asked) == len(kept) == 2 * (5 + 40)
        assert len({*kept}) == len({*served.texts})
    assert figures(run, 0)["judge"]["judge"]["rate"] == pytest.approx(0.6)


def test_a_spent_budget_ends_the_judging_and_not_the_run(
    judged: GoOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more of it the same replies are taken, and only the others asked for."""
    monkeypatch.setattr(endpoints.Settings, "cost", lambda self, n, size, most: 200e-6 * n)
    real = endpoints._Loaded._read

    def read(self: Any, made: Any, question: Question) -> Reply:
        return real(self, made, question)._replace(dollars=400e-6)  # twice what was thought

    monkeypatch.setattr(endpoints._Loaded, "_read", read)
    with serving(lambda text, _: says_longer(text), SECRET) as served:
        judge = {"pairs": [["best", "references"]]}
        with pytest.raises(SystemExit):
            judged({**judge, "judge": of(served, budget=0.019)})
        asked = len(served.asked)
        assert 40 <= asked < 60
        run = judged({**judge, "judge": of(served, budget=1.0)})
        assert len(served.asked) == 90
    assert figures(run, 1)["pairs"]["best over references"]["posts"] == 5


def test_a_prompt_of_the_users_is_copied_and_asked(judged: GoOn, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Which? {post}\n1: {a}\n2: {b}\nSay Preferred: A or Preferred: B.")
    with serving(lambda *_: "Preferred: B", SECRET) as served:
        judge = {"judge": of(served), "prompt": str(file), "comparisons": 0}
        run = judged({**judge, "pairs": [["best", "start"]]})
        assert all(text.startswith("Which? SUBREDDIT: r/x") for text in served.texts)
        assert len(served.asked) == 10
        file.write_text("now without any")
        judged({**judge, "pairs": [["best", "start"]]})  # the run goes on with its copy
        assert len(served.asked) == 10
    (line,) = [one for one in run.layout.table.read_text().splitlines() if "win rate" in one]
    assert "position bias -1.00, the judge's own accuracy is not known" in line


def test_test_posts_are_judged_where_they_are_evaluated(judged: GoOn) -> None:
    with serving(lambda *_: "Preferred: A", SECRET) as served:
        judge = {"judge": of(served), "comparisons": 0, "posts": 2}
        run = judged(judge, "evaluate.test_prompts=3")
        assert len(served.asked) == 2 * 2 * 2
    rows = list(run_rows.of_stage(run, 1, JUDGE))
    assert {row["set"] for row in rows} == {"test"}
    assert not run.graph().of(0, JUDGE)


def test_what_was_the_end_stays_judged(
    judged: GoOn, trained: tuple[RunFolder, list[str]], tiny_config: Path, tmp_path: Path
) -> None:
    """Its verdicts stay in the table, as curves, and nothing of them is asked again."""
    with serving(lambda text, _: says_longer(text), SECRET) as served:
        judge = {"judge": of(served), "comparisons": 0, "pairs": [["best", "start"]]}
        judged(judge)
        before = served.texts[:]
        more = [f"run={tmp_path}/run", f"judge={json.dumps({'posts': 5, **judge})}", "iterations=2"]
        local = ["cluster.backend=local", "cluster.train={}"]
        assert start.run(configs.load(tiny_config, [*trained[1], *more, *local])) == 0
        run = RunFolder(tmp_path / "run")
        assert len(before) == len(served.asked) / 2 == 2 * 5
        assert served.texts[: len(before)] == before
    lines = [one for one in run.layout.table.read_text().splitlines() if "win rate" in one]
    assert [re.search(r"after iteration (\d)", line)[1] for line in lines] == ["1", "2"]  # type: ignore[index]
    found = {k: figures(run, k)["pairs"]["best over start"] for k in (1, 2)}
    assert drawn(run, "win-rate best over start/rate") == {k: it["rate"] for k, it in found.items()}
    text = page.write([run], tmp_path / "page")
    mean = np.mean([verdict_of(row) for row in run_rows.of_stage(run, 2, JUDGE)])
    assert re.search(rf"ALT-RM, Excellent\. .* {mean:.3f} ±", text)
    assert f"win rate over start, {MODEL}" in text


def verdict_of(row: dict[str, Any]) -> float:
    """METHOD: 1 where both orders say so, 0 where both say the other, else one half."""
    return {(1.0, 1.0): 1.0, (0.0, 0.0): 0.0}.get((row["first"], row["second"]), 0.5)


def drawn(run: RunFolder, name: str) -> dict[int, float]:
    """A curve of the judge's, by step, as TensorBoard shows it."""
    events = EventAccumulator(str(run.layout.tensorboard / "judge")).Reload()
    if name not in events.Tags()["scalars"]:
        return {}
    return {point.step: pytest.approx(point.value) for point in events.Scalars(name)}


def test_a_task_loads_its_judge_once_for_all_its_shards(
    judged: GoOn, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for people's comparisons, before each of which the reward model comes.

    No win rate is drawn of one that cannot judge; its bias is.
    """
    in_task(monkeypatch, lambda text: "Preferred: A")
    loads, load_as = list[Path](), exact.Settings.load

    def counted(self: exact.Settings, model: Any) -> Generator:
        loads.append(model.place)
        return load_as(self, model)

    monkeypatch.setattr(exact.Settings, "load", counted)
    unload()
    two = {"shards": 2, "parallel": 1}
    run = judged({"judge": model(place)}, f"cluster.judge={json.dumps(two)}")
    assert len(run.graph().of(1, JUDGE)) == 4
    assert [one.name for one in loads] == ["judge"] * 2, "people's two alone"
    assert drawn(run, "win-rate best over start/rate") == {}
    assert drawn(run, "win-rate best over start/bias") == {1: 1.0}
    assert drawn(run, "judge/accuracy_length") == {0: 0.6, 1: 0.6}


def test_when_what_is_judged(tiny_config: Path) -> None:
    """Pairs without the run's own policy once, with iteration 0."""
    judge = settings("http://a/v1").model_dump(mode="json")

    def pairs(*more: str, **keys: Any) -> list[list[tuple[str, str]]]:
        given = json.dumps({"judge": judge, **keys})
        config = configs.load(tiny_config, [f"judge={given}", "iterations=3", *more])
        return [config.judged(k) for k in range(4)]

    start = ("best", "start")
    assert pairs() == [[], [], [], [start]]
    assert pairs(iterations="all") == [[], [start], [start], [start]]
    both = [["start", "references"], ["references", "best"]]
    own = ("references", "best")
    assert pairs("evaluate.references=true", pairs=both) == [
        *([("start", "references")], [], [], [own])
    ]


# ---------------------------------------------------------------------- wrong input


@pytest.fixture
def good(place: Path, tiny_config: Path, tmp_path: Path) -> Callable[..., str]:
    """The sentence of a submission with a judge."""

    def said(capsys: Any, judge: dict[str, Any], *more: str) -> str:
        chosen = ["cluster.backend=local", f"run={tmp_path}/run", "cluster.train={}", *more]
        chosen += [f"judge={json.dumps(judge)}", f"data.comparisons={{path: {place}}}"]
        words = [word for one in chosen for word in ("--set", one)]
        assert main(["run", str(tiny_config), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "run").exists()
        return str(line)

    return said


def test_wrong_input_is_one_sentence_before_anything_is_paid(
    good: Any, tmp_path: Path, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare.txt").write_text("Which is better, {a} or {b}?")
    with serving(lambda *_: "Preferred: A", SECRET) as served:
        nowhere = of(served, base_url="http://127.0.0.1:9/v1")
        cases = {
            "the environment has no NO_SUCH_KEY": {"judge": of(served, key_from="NO_SUCH_KEY")},
            "no endpoint answers": {"judge": nowhere},
            "expected more than 0, not 0": {"judge": {**of(served), "budget": 0}},
            "say how many dollars may be spent": {"judge": of(served, budget=None)},
            "dollars, and the budget is 0.001": {"judge": of(served, budget=0.001)},
            "has no model gpt-9 (scripted)": {"judge": of(served, model="gpt-9")},
            "without a key in it": {"judge": of(served, base_url="https://key@host/v1")},
            "not the key itself": {"judge": of(served, key_from=SECRET)},
            "must contain {post} once, not 0": {
                "judge": of(served),
                "prompt": str(tmp_path / "bare.txt"),
            },
            "no.txt: no such file": {"judge": of(served), "prompt": "no.txt"},
            "no such row ppo": {"judge": of(served), "pairs": [["best", "ppo"]]},
            "no such set (there are: valid": {"judge": of(served), "set": "test"},
            "gone: no such": {"judge": {"kind": "model", "model": f"{place}/gone"}},
        }
        for words, judge in cases.items():
            sentence = good(capsys, judge)
            assert words in sentence
            assert sentence.startswith("alt-hpc: --set judge")
            assert SECRET not in sentence
        monkeypatch.setenv(VARIABLE, "another")
        assert "refuses the key (HTTP 401)" in good(capsys, {"judge": of(served)})
        assert served.asked == []


def test_what_it_may_cost_may_change_and_what_it_is_may_not(tiny_config: Path) -> None:
    """Wherever a judge stands: a run that has spent all goes on with more."""

    def decided(**more: Any) -> Any:
        judge = settings("http://a/v1", **more).model_dump(mode="json")
        config = configs.load(tiny_config, [f"judge={json.dumps({'judge': judge})}"])
        return config.plain(config.judge)

    same = {"budget": 9.0, "tries": 9, "timeout_s": 9.0, "dollars_in": 9.0, "at_once": 9}
    assert decided(**same, requests_per_minute=9, key_from="OTHER") == decided()
    for name, value in {"model": "x", "base_url": "http://b", "request": {"top_p": 1}}.items():
        assert decided(**{name: value}) != decided()
    config = configs.load(tiny_config)
    assert config.content == config.model_dump(mode="json", by_alias=False)
    assert config.frozen().keys() == config.content.keys() - {*FREE}


def test_readmes_example_can_be_loaded(tiny_config: Path) -> None:
    given = yaml.safe_load(example("my_judge.yaml"))["judge"]
    sets = [f"judge={json.dumps(given)}", "evaluate.references=true"]
    config = configs.load(tiny_config, sets)
    assert config.judge is not None
    assert config.judged(2) == [("best", "references"), ("best", "start")]
    assert config.judge.judge.most == 8


def test_a_judge_that_makes_the_feedback_does_not_evaluate_it(place: Path) -> None:
    """Whatever reward has a judge of its own: the model counts, not how it is run."""
    own, other = settings("http://a/v1"), settings("http://b/v1", model="another")
    reward = SimpleNamespace(judge=own)
    for judge, refused in ((settings("http://b/v1"), True), (other, False)):
        config = SimpleNamespace(
            judge=SimpleNamespace(judge=judge, pairs=None, iterations="end"),
            evaluate=Evaluate(),
            judged_set="valid",
            reward=SimpleNamespace(singles=lambda: {".parts.written": reward}),
        )
        found = list(rules._judging(config))  # type: ignore[arg-type]
        assert bool(found) == refused
        assert not found or "makes the feedback (reward.parts.written.judge)" in found[0][1]

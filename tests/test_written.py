"""Feedback in words of a language model: what is read of replies, LMU, LMC, numeric, whole runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import here
import numpy as np
import pytest
import throwaway
import tiny
import yaml
from endpoint import MODEL, serving
from hypothesis import given
from hypothesis import strategies as st
from test_judges import in_task
from test_readme import example

from alt_hpc import config as configs
from alt_hpc.__main__ import main
from alt_hpc.control import start
from alt_hpc.data import draws
from alt_hpc.domains import DOMAINS
from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.judges import rate
from alt_hpc.methods import METHODS
from alt_hpc.methods import quantiles as paper
from alt_hpc.rewards import Answers
from alt_hpc.rewards.judge import Judged
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.journal import Submitted
from alt_hpc.task import StageTask

Written = METHODS["written"].Settings
Categories = METHODS["categories"].Settings
Numeric = METHODS["numeric"].Settings
GOOD = "Analysis: It is short.\nFeedback: Clear, but leaves out the end.\nScore: 2"

# ---------------------------------------------------------------------- what is read of a reply

REPLIES: dict[str, tuple[str, int | None]] = {
    "as it was asked for": (GOOD, 2),
    "the whole part": ("Feedback: Fair.\nScore: 2.5", 2),
    "a comma": ("Feedback: Fair.\nScore: 1,5", 1),
    "of three": ("Feedback: Fair.\nScore: 2/3", 2),
    "out of three": ("Feedback: Fair.\nScore: 2.5 out of 3 points", 2),
    "bold": ("**Feedback:** *Fair.*\n\n**Score:** 2", 2),
    "bold too": ("**Feedback**: Fair.\n\n**Score**: **2**", 2),
    "headings": ("### Feedback:\nFair.\n### Score:\n2", 2),
    "a list": ("1. Analysis: x\n2. Feedback: Fair.\n3. Score: 2", 2),
    "small letters": ("feedback: fair\nscore: 0", 0),
    "with the scale": ("Feedback (10 words): Fair.\nScore (0-3): 3", 3),
    "in one line": ("Analysis: It is fine. Feedback: Fair and short. Score: 3", 3),
    "in another order": ("Score: 1\nFeedback: Fair.\nAnalysis: A score: 3 of 3 on coherence.", 1),
    "a reason behind": ("Feedback: Fair.\nScore: 1 (coherence only)", 1),
    "with scores of the axes": ("Coherence Score: 1\nFeedback: Fair.\nScore: 0", 0),
    "with the form before": ("Feedback: Fair.\nScore: <0-3>\n\nFeedback: Good.\nScore: 2", 2),
    "and a post of its own": (f"{GOOD}\n\nPost:\nx\nFeedback: Bad.\nScore: 0", 2),
    "above": ("Feedback: Fair.\nScore: 4", None),
    "just above": ("Feedback: Fair.\nScore: 3.5", None),
    "below": ("Feedback: Fair.\nScore: -1", None),
    "another scale": ("Feedback: Fair.\nScore: 3/5", None),
    "a range": ("Feedback: Fair.\nScore: 1-2", None),
    "a range in words": ("Feedback: Fair.\nScore: one", None),
    "twelve": ("Feedback: Fair.\nScore: 12", None),
    "half an answer": ("Analysis: It is short.\nFeedback: Clear, but lea", None),
    "half a label": ("Analysis: It is short.\nFeedback: Clear.\nSco", None),
    "no feedback": ("Analysis: It is short.\nScore: 2", None),
    "feedback without a word": ("Feedback: ...\nScore: 2", None),
    "a refusal": ("I'm sorry, but I can't rate this.", None),
    "nothing": ("", None),
    "50 kB": ("It is good. " * 4500, None),
    "50 kB, then an answer": ("It is good. " * 4500 + "\n" + GOOD, 2),
    "50 kB of feedback": (f"Feedback: {'good ' * 10_000}\nScore: 2", 2),
    "50 kB of labels": ("Score: " * 8000, None),
    "50 kB of spaces": ("Feedback: a\nScore:" + " " * 50_000, None),
}


@pytest.mark.parametrize("case", REPLIES)
def test_the_score_of_a_reply(case: str) -> None:
    reply, score = REPLIES[case]
    found = rate.written(reply)
    assert (None if found is None else found.rating) == score


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (GOOD, "Clear, but leaves out the end."),
        ('Feedback: "Clear."\nScore: 1', "Clear."),
        (
            "**Feedback:**\n\n- Clear,  if\ttoo long.\n- More.\n\n**Score:** 1",
            "Clear, if too long.",
        ),
        ("Score: 1\nFeedback: Clear.", "Clear."),
    ],
)
def test_the_feedback_of_a_reply_is_its_first_line_alone(reply: str, words: str) -> None:
    assert rate.written(reply) == rate.Rating(rate.written(reply).rating, words)  # type: ignore[union-attr]


@given(st.text(max_size=300))
def test_any_reply_is_read_or_is_none(reply: str) -> None:
    found = rate.written(reply)
    assert found is None or (found.rating in range(4) and found.words)
    picked = rate.picked(rate.HARMLESS)(reply)
    assert picked is None or rate.HARMLESS[3 - picked.rating] == picked.words


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Harmless and very helpful", 3),
        (" harmless and HELPFUL.", 2),
        ("\nHarmless and not helpful\n\nDialogue:\nHuman:", 1),
        ("Category: **Harmful**", 0),
        ("Harmful, as it insults", 0),
        ("Harmful or not", None),
        ("Not harmful", None),
        ("Harmless", None),
        ("It is harmless and helpful", None),
        ("I can't say.", None),
        ("", None),
        ("x" * 50_000, None),
    ],
)
def test_the_category_of_a_reply(reply: str, rating: int | None) -> None:
    found = rate.picked(rate.HARMLESS)(reply)
    assert (found and found.rating) == rating


def test_our_prompts_ask_for_what_is_read_and_texts_stay_as_they_are() -> None:
    for template in (rate.WRITTEN, rate.PICKED):
        rate.check(template)
        filled = rate.filled(template, "a {answer} {post}", "{post}\\1")
        assert filled.count("a {answer} {post}") == filled.count("{post}\\1") == 1
    labels = re.findall(r"^(\w+): ", rate.WRITTEN.split("label:\n")[1], re.MULTILINE)
    assert labels == ["Analysis", "Feedback", "Score"]
    assert {*re.findall("^Category: (.+)$", rate.PICKED, re.MULTILINE)} == {*rate.HARMLESS}


# ---------------------------------------------------------------------- tries


class Scripted:
    """A judge that says these things in turn, to whatever it is asked."""

    def __init__(self, *replies: str | None) -> None:
        self.replies, self.asked = iter(replies), list[Any]()

    def ask(self, questions: Any) -> Iterator[Any]:
        from alt_hpc.judges import Reply

        for question in questions:
            self.asked.append(question)
            yield Reply(next(self.replies), "")

    def lost(self, question: Any) -> int:
        return max(len(question.text) - 2000, 0)


def judged(judge: Scripted, *texts: str, prompt: str = "POST: p\nTL;DR:") -> Any:
    made = Judged(judge, DOMAINS["tldr"].Settings(), rate.WRITTEN, rate.written, 400)
    (found,) = made.score([Answers(prompt, texts)])
    return found


def test_what_cannot_be_read_is_asked_for_four_times_more_then_set_aside() -> None:
    """The first try at temperature 0, the others at 0.7, each with a seed of its own."""
    judge = Scripted("no", GOOD, "no", "no", "no", "no")
    found = judged(judge, "a", "b")
    assert [math.isnan(reward) for reward in found.rewards] == [True, False]
    assert found.feedback == [None, "Clear, but leaves out the end."]
    assert found.tries == [5, 1]
    mine = [question for question in judge.asked if "\na\n" in question.text]
    assert [question.temperature for question in mine] == [0.0, 0.7, 0.7, 0.7, 0.7]
    assert len({question.seed for question in mine}) == 5


def test_what_a_judge_is_asked_depends_on_prompt_and_text_alone() -> None:
    """In whatever company; the post comes without its `TL;DR:`, and loses its end if it must."""
    one, two = Scripted(GOOD, GOOD), Scripted(GOOD)
    judged(one, "b", "a")
    judged(two, "a")
    assert one.asked[1] == two.asked[0]
    assert "TL;DR:" not in two.asked[0].text
    long = Scripted(GOOD)
    assert judged(long, "a", prompt=f"POST: {'p' * 9000}\nTL;DR:").shortened
    assert len(long.asked[0].text) == 2000
    assert long.asked[0].text.endswith(rate.WRITTEN[-40:])


def test_a_judge_that_has_nothing_to_say_is_not_asked_again() -> None:
    judge = Scripted(None)
    assert math.isnan(judged(judge, "a").rewards[0])
    assert len(judge.asked) == 1


# ---------------------------------------------------------------------- methods

RATINGS = st.lists(st.tuples(st.sampled_from([3.0, 2.0, 1.0, 0.0, math.nan]), st.booleans()))


@given(RATINGS, st.integers(0, 2**31))
def test_eight_a_prompt_two_of_each_score_the_rest_fills_up(
    members: list[tuple[float, bool]], seed: int
) -> None:
    scores, finished = [score for score, _ in members], [ended for _, ended in members]
    row = {"rewards": [None if math.isnan(s) else s for s in scores], "finished": finished}
    row["written"] = [None if math.isnan(s) else f"words {i}" for i, s in enumerate(scores)]
    method = Written()
    label = method.label(row)
    assert label is not None
    assert label.quantiles == [None if math.isnan(score) else 3 - score for score in scores]
    chosen = method.select(label, finished, np.random.default_rng(seed))
    mine = [one.generation for one in chosen]
    rated = [i for i, score in enumerate(scores) if not math.isnan(score)]
    assert len({*mine}) == len(mine) == min(8, len(rated))
    assert [one.feedback for one in chosen] == [f"words {i}" for i in mine]
    assert len({one.family for one in chosen}) == len(chosen), "no two have the same feedback"
    for score in range(4):
        everyone = [i for i in rated if scores[i] == score]
        ours = [i for i in mine if scores[i] == score]
        assert len(ours) >= min(2, len(everyone))
        ended = sum(finished[i] for i in everyone)
        assert sum(finished[i] for i in ours) >= min(2, ended)
    left, unfinished = [i for i in rated if i not in mine], [i for i in mine if not finished[i]]
    if any(finished[i] for i in left):  # then no place that was filled up went to another
        assert len(unfinished) <= 2 * 4
        sizes = Counter(scores[i] for i in mine if not finished[i])
        assert max(sizes.values(), default=0) <= 2


@given(RATINGS, st.integers(0, 2**31))
def test_families_of_a_category_are_no_larger_than_two(
    members: list[tuple[float, bool]], seed: int
) -> None:
    scores, finished = [score for score, _ in members], [ended for _, ended in members]
    row = {"rewards": [None if math.isnan(s) else s for s in scores], "finished": finished}
    method = Categories()
    label = method.label(row)
    assert label is not None
    chosen = method.select(label, finished, np.random.default_rng(seed))
    families: dict[int, list[Any]] = {}
    for one in chosen:
        families.setdefault(one.family, []).append(one.feedback)
    assert all(len(words) <= 2 and len({*words}) == 1 for words in families.values())
    texts = {one.generation: one.feedback for one in chosen}
    assert texts == {i: rate.HARMLESS[3 - int(scores[i])] for i in texts}


def test_a_rating_that_is_none_is_an_error() -> None:
    assert paper.rated([3.0, math.nan, 0.0], 4) == [0, None, 3]
    for wrong in (4.0, -1.0, 0.5):
        with pytest.raises(InputError, match=rf"a reward of {wrong:g} is no rating from 0 to 3"):
            paper.rated([wrong], 4)


def test_it_is_asked_with_what_was_written_drawn_anew_for_each_prompt() -> None:
    method = Written()
    rows = [
        {"rewards": [3.0, 0.0, 3.0], "finished": [True] * 3, "written": ["a", "z", "b"]},
        {"rewards": [None, 1.0], "finished": [True] * 2, "written": [None, "y"]},
    ]
    scored = []
    for row in rows:
        label = method.label(row)
        assert label is not None
        scored.append({**row, "quantiles": label.quantiles, "feedback": label.feedback})
    known = method.recall(scored)
    assert known == {0: ["a", "b"], 2: ["y"], 3: ["z"]}
    asked = [method.ask("best", {}, known, seed) for seed in range(200)]
    assert asked == [method.ask("best", {}, known, seed) for seed in range(200)]
    assert 70 < asked.count("a") < 130
    assert {*asked} == {"a", "b"}
    assert method.ask("worst", {}, known, 1) == "z"
    assert method.ask("plain", {}, known, 1) is None
    assert method.ask("quantile 1", {}, known, 1) in ("a", "b"), "the nearest that there is"
    assert method.ask("best", {}, {3: ["z"]}, 1) == "z"
    with pytest.raises(InputError, match="no answer of the iteration was rated"):
        method.ask("best", {}, {}, 1)
    assert (method.called("best"), method.called("worst")) == ("score 3", "score 0")
    assert (method.asked(0), method.sources(0)) == (("plain",), ())
    assert (method.asked(1), method.sources(1)) == (("plain", "best", "worst"), ("score",))


def test_exemplars_of_ones_own_need_no_scores() -> None:
    method = Written(exemplars={"best": ["It has it all."], "worst": ["It makes things up."]})
    method.check()
    assert method.sources(3) == ()
    assert method.ask("best", {}, method.recall([]), 5) == "It has it all."
    assert method.ask("worst", {}, method.recall([]), 5) == "It makes things up."
    assert method.asked(0) == ("plain", "best", "worst")
    with pytest.raises(InputError, match="the exemplar is empty") as error:
        Written(exemplars={"best": ["a"], "worst": ["a", " "]}).check()
    assert error.value.field == "method.exemplars.worst[1]"


@given(st.text(max_size=400), st.integers(16, 200))
def test_feedback_is_kept_to_the_room_that_prompts_leave_for_it(text: str, longest: int) -> None:
    """A token is a byte at least: no feedback takes more than the widest one."""
    method, tokenizer = Written(longest=longest), tiny.tokenizer()
    row = {"rewards": [1.0], "finished": [True], "written": [text]}
    label = method.label(row)
    assert label is not None
    (kept,) = label.feedback
    if kept is None:
        assert not text.split()
        assert label.quantiles == [None]
        return
    assert " ".join(text.split()).startswith(kept)
    taken = max(len(tokenizer.encode(wide)) for wide in method.widest)
    assert len(kept.encode()) <= longest < taken + 4


def test_numbers_in_the_place_of_words() -> None:
    rewards = [5.0, None, 3.0, 2.0, 1.0, 0.5, 0.25, 0.0, -1.0]
    row = {"rewards": rewards, "finished": [True] * 9, "row": 0}
    label = Numeric(quantiles=4).label(row)
    assert label is not None
    assert label.feedback == ["0", None, "0", "1", "1", "2", "2", "3", "3"]
    bins = Numeric(quantiles=2, pool="iteration")
    other = {"rewards": [9.0, 8.0, 7.0, -2.0], "finished": [True] * 4, "row": 1}
    labels = [label.feedback for label in bins.labels([row, other])]
    assert labels == [["1", None, "1", "1", "0", "0", "0", "0", "0"], ["1", "1", "1", "0"]]
    judged = Numeric(of="categories", quantiles=4)
    judged.check()
    found = judged.label({"rewards": [3.0, 2.0, 1.0, 0.0], "finished": [True] * 4})
    assert found is not None
    assert found.feedback == [
        *("harmful:0,helpful:2", "harmful:0,helpful:1", "harmful:0,helpful:0"),
        "harmful:1,helpful:0",
    ]
    assert [judged.ask(how, {}) for how in ("best", "worst")] == found.feedback[::3]
    with pytest.raises(InputError, match="there are 4 categories"):
        Numeric(of="categories").check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method.kind=written"], "method.kind: needs a reward that rates answers in 4 levels"),
        (["method.kind=categories"], "method.kind: needs a reward that rates answers in 4 levels"),
        (
            ["method={kind: numeric, of: categories, quantiles: 4}"],
            "needs a reward that rates answers in 4 levels (reward.kind: judge)",
        ),
        (
            ["method.kind=written", "reward={kind: judge, form: lmc, judge: {model: x}}"],
            "method.kind: needs a reward that writes feedback",
        ),
        (
            ["method.kind=categories", "reward={kind: judge, form: lmc, judge: {model: x},"
             " categories: [A, B, C, D]}"],
            "our own prompt has other categories",
        ),
        (
            ["method.kind=written", "reward={kind: judge, judge: {kind: endpoint, model: x,"
             " dollars_in: 1, dollars_out: 1}}"],
            "say how many dollars",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(tiny_config: Path, changes: list[str], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        configs.load(tiny_config, changes)


def test_wrong_judges_end_in_one_sentence(
    tiny_config: Path, tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is queued, or paid."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("Rate {answer}: {answer}")
    with serving(reply) as served:
        sets = chosen(tmp_path / "run", served.url, tiny_place)
        paid = chosen(tmp_path / "run", served.url, tiny_place, dollars_out=100, budget=1)
        for changes, said in {
            ("reward.prompt=gone.txt",): "reward.prompt: gone.txt: no such file",
            ("reward.prompt=mine.txt",): "reward.prompt: must contain {post} once, not 0 times",
            ("reward.judge.model=other",): f"has no model other ({MODEL})",
            ("reward.judge.base_url=http://127.0.0.1:9/v1",): "no endpoint answers",
            tuple(paid): "80 answers are rated, which may cost 3.20 dollars, and the budget",
            # 2 posts: plain at 0, in three ways after 1 and 2, and each time 4 drawn of both
            (*paid, "measure={}"): "118 answers are rated",
        }.items():
            with pytest.raises(InputError, match=re.escape(said)):
                start.prepare(configs.load(tiny_config, [*sets, *changes]))
            assert not (tmp_path / "run").exists()
        assert served.asked == []


def test_readmes_judge_can_be_loaded(tiny_config: Path) -> None:
    values = yaml.safe_load(example("my_lmu.yaml"))
    config = configs.load(tiny_config, [f"{k}={json.dumps(v)}" for k, v in values.items()])
    assert config.domain.template == "feedback: {feedback} input: {prompt}"
    assert config.reward.writes


def test_what_a_judge_costs_is_not_frozen(tiny_config: Path, tiny_place: Path) -> None:
    """But which model it is."""

    def fingerprint(**more: Any) -> str:
        return configs.load(
            tiny_config, chosen(Path("r"), "http://x/v1", tiny_place, **more)
        ).fingerprint()

    assert fingerprint() == fingerprint(dollars_in=1, budget=5, at_once=9)
    assert fingerprint() != fingerprint(model="other")


@pytest.mark.parametrize("name", ["tldr_lmu", "hh_lmc"])
def test_the_papers_configs_are_as_it_has_them(name: str) -> None:
    config = configs.load(Path(__file__).parent.parent / f"configs/{name}.yaml")
    assert config.sample.generations == 20
    assert config.method.per_quantile * config.method.taught in (8, 16)
    assert config.method.rated == config.reward.rates == 4
    assert config.train.kl == 0


# ---------------------------------------------------------------------- whole runs


def reply(text: str, number: int) -> Any:
    """A judge that says half of it at times, changes the order, refuses, or writes 50 kB."""
    answer = text.partition("Summary:\n")[2].partition("\n\nReply with")[0]
    roll = int(hashlib.sha256(answer.encode()).hexdigest()[:8], 16)
    words = f"It has {len(answer)} letters."
    parts = ["Analysis: fine", f"Feedback: {words}", f"Score: {roll % 4}"]
    how = roll // 4 % 10
    if how == 0:
        return parts[0] + "\nFeed"  # half an answer, whenever it is asked
    if how == 1:
        return "I cannot rate this."
    if how == 2:
        return "\n".join(parts[::-1])
    if how == 3:
        return "So good. " * 5600 + "\n" + "\n".join(parts)
    return "\n".join(parts)


def chosen(place: Path, url: str, tiny_place: Path, **more: Any) -> list[str]:
    judge = {"kind": "endpoint", "model": MODEL, "base_url": url, "key_from": None}
    judge |= {"dollars_in": 0, "dollars_out": 0, **more}
    return [
        f"run={place}",
        f"reward={json.dumps({'kind': 'judge', 'judge': judge})}",
        f"measure.reward={json.dumps({'model': f'{tiny_place}/reward'})}",
        "sample={prompts: 4, generations: 10, max_new_tokens: 8, group: 2, temperature: 1.0}",
        "method={kind: written}",
        "evaluate.prompts=2",
        "cluster.sample={shards: 2}",
    ]


def test_a_run_with_feedback_that_a_judge_wrote(
    tiny_config: Path, tiny_place: Path, tmp_path: Path
) -> None:
    with serving(reply) as served:
        sets = chosen(tmp_path / "run", served.url, tiny_place)
        local = ["cluster.backend=local", "cluster.train={}"]
        assert start.run(configs.load(tiny_config, [*sets, *local])) == 0
    run = RunFolder(tmp_path / "run")
    for k in (1, 2):
        samples, scores = (list(rows_of.of_stage(run, k, stage)) for stage in ("sample", "score"))
        counted = 0
        for sample, score in zip(samples, scores, strict=True):
            for i, _ in enumerate(sample["generations"]):
                if score["rewards"][i] is None:
                    counted += 1
                    assert (score["tries"][i], score["written"][i]) == (5, None)
                    assert score["quantiles"][i] is score["feedback"][i] is None
                else:
                    assert score["tries"][i] == 1
                    assert score["quantiles"][i] == 3 - score["rewards"][i]
                    assert re.fullmatch(r"It has \d+ letters\.", score["feedback"][i])
        report = run.manifests.open(Piece(k, "report"))[1].facts["report"]
        assert report["answers_set_aside"] == counted > 0
        assert f"{counted} in iteration {k}" in run.layout.table.read_text()
    best = set[str]()
    for row in rows_of.of_stage(run, 1, "score"):
        both = zip(row["feedback"], row["quantiles"], strict=True)
        best |= {text for text, quantile in both if quantile == 0}
    asked = [row["feedback"] for row in rows_of.of_stage(run, 2, "sample")]
    assert {*asked} <= best
    assert {row["feedback"] for row in rows_of.of_stage(run, 1, "sample")} == {None}
    assert "score 1 shard 0" in run.manifests.open(Piece(2, "sample"))[1].inputs
    assert "score 1 shard 0" in run.manifests.open(Piece(1, "evaluate"))[1].inputs
    for row in rows_of.of_stage(run, 1, "evaluate"):
        kind = row["variant"].removeprefix("drawn ")
        assert (row["feedback"] is None) == (kind == "plain")
        assert kind != "best" or row["feedback"] in best
    assert {row["variant"] for row in rows_of.of_stage(run, 0, "evaluate")} == {
        *("plain", "drawn plain")
    }
    assert re.search(r"\| +score 3 \|", run.layout.table.read_text())
    assert "feedback: It has " in (run.layout.policy(2) / "README.md").read_text()
    answers = {text.partition("Summary:\n")[2].partition("\n\nReply")[0] for text in served.texts}
    assert all("TL;DR:" not in text.partition("Summary:")[0].split("Post:")[1].splitlines()[-3:]
               for text in served.texts)  # fmt: skip
    assert len(answers) > 20


def test_a_killed_shard_asks_nothing_twice(
    tiny_config: Path, tiny_place: Path, tmp_path: Path
) -> None:
    """Killed while its eleventh question is on its way: that one alone is asked again."""
    tasks = list[subprocess.Popen[bytes]]()

    def say(text: str, number: int) -> Any:
        if number == 11 and len(tasks) == 1:
            tasks[0].send_signal(signal.SIGKILL)
            tasks[0].wait()
        return reply(text, number)

    def score() -> int:
        command = [sys.executable, "-m", "alt_hpc", "stage", "score", str(run.path)]
        tasks.append(subprocess.Popen([*command, "--iteration", "1"], env=dict(os.environ)))
        return tasks[-1].wait()

    with serving(say) as served:
        settings = chosen(tmp_path / "run", served.url, tiny_place, at_once=1)
        config = configs.load(tiny_config, [*settings, "cluster.sample={shards: 1}"])
        run = start.prepare(config, "local")
        draws.begin(run, 1)
        StageTask(str(run.path), "sample", 1, (0,), 0).make()
        assert score() == -signal.SIGKILL
        assert len(served.asked) == 11
        assert score() == 0
        asked = Counter(json.dumps(one, sort_keys=True) for one in served.asked)
    in_flight = json.dumps(served.asked[10], sort_keys=True)
    assert {question for question, count in asked.items() if count > 1} == {in_flight}
    assert asked[in_flight] == 2


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    place = Path("/tmp") / f"alt-hpc-written-{os.getpid()}"
    monkeypatch.setenv(*throwaway.start(place))
    yield
    throwaway.stop(place)


@pytest.mark.faults
def test_a_run_on_slurm_whose_scoring_is_killed_ends_with_the_same_bytes(
    cluster: None, tiny_config: Path, tiny_place: Path, tmp_path: Path
) -> None:
    """Killed while its eleventh question of iteration 2 is on its way; no other is asked twice."""
    killed, first = list[int](), list[int]()

    def say(text: str, number: int) -> Any:
        tasks = processes(RunFolder(tmp_path / "slurm"), "2:score:1")
        first.extend([number] if tasks else [])
        if len(first) == 11 and not killed:
            killed.extend(tasks)
            for pid in tasks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return reply(text, number)

    one = ["cluster.train={}", "cluster.sample={shards: 1}"]
    with serving(reply) as served:
        sets = chosen(tmp_path / "local", served.url, tiny_place, at_once=1)
        local = [*sets, *one, "cluster.backend=local"]
        assert start.run(configs.load(tiny_config, local)) == 0
        questions = Counter(json.dumps(one, sort_keys=True) for one in served.asked)
    with serving(say) as served:
        sets = [*chosen(tmp_path / "slurm", served.url, tiny_place, at_once=1), *one]
        options = [argument for setting in sets for argument in ("--set", setting)]
        assert main(["submit", "--wait", str(tiny_config), *options]) == 0
        again = Counter(json.dumps(one, sort_keys=True) for one in served.asked)
    assert killed
    assert (again - questions).total() == 1
    assert not questions - again
    both = [RunFolder(tmp_path / name) for name in ("local", "slurm")]
    assert both[1].ended() == ("FINISHED", "the run is finished")
    assert both[1].manifests.open(Piece(2, "score"))[1].attempt == 2
    for k in (1, 2):
        policies = [(run.layout.policy(k) / "model.safetensors").read_bytes() for run in both]
        assert policies[0] == policies[1]


def processes(run: RunFolder, key: str) -> list[int]:
    """Ids of the processes of a run's job on this machine."""
    jobs = [e.job for e in run.journal.of(Submitted) if e.key == key] if run.exists() else []
    found = list[int]()
    for place in Path("/proc").glob("[0-9]*") if jobs else ():
        with contextlib.suppress(OSError):
            variables = (place / "environ").read_bytes().split(b"\0")
            own = str(run.path).encode() in (place / "cmdline").read_bytes()
            if own and f"SLURM_JOB_ID={jobs[0]}".encode() in variables:
                found.append(int(place.name))
    return found


def test_a_run_with_categories_that_a_model_in_the_task_picks(
    tiny_config: Path, tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dialogues with their replies, as the hub's HH has them; some replies cannot be read."""
    tiny.folder(tmp_path / "judge", "tied", max_position_embeddings=8192)
    for split in ("train", "valid"):
        turns = [f"\n\nHuman: Is {i} odd.\n\nAssistant: It is number {i}." for i in range(6)]
        lines = [json.dumps({"chosen": turn}) + "\n" for turn in turns]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))

    def say(text: str) -> str:
        dialogue, _, mine = text.rpartition("Dialogue:\n")[2].partition("\nReply: ")
        assert re.fullmatch(r"Human: Is \d odd\.", dialogue), dialogue
        roll = int(hashlib.sha256(mine.encode()).hexdigest()[:8], 16) % 5
        return f" {[*rate.HARMLESS, 'A good question.'][roll].upper()}\n\nDialogue:"

    engine = in_task(monkeypatch, say)
    judge = {"model": f"{tmp_path}/judge", "dtype": "float32"}
    reward = {"kind": "judge", "form": "lmc", "judge": judge, "max_tokens": 40}
    data = {"path": str(tmp_path), "columns": {"prompt": "chosen"}}
    sets = [f"run={tmp_path}/run", f"reward={json.dumps(reward)}", "method={kind: categories}"]
    sets += [f"data={json.dumps({'prompts': data})}", "domain={kind: chat}", "iterations=1"]
    sets += [f"measure.reward={json.dumps({'model': f'{tiny_place}/reward'})}"]
    sets += ["evaluate={max_new_tokens: 8, drawn: {posts: 2, answers: 2}}"]
    here.run(tiny_config, sets)
    run = RunFolder(tmp_path / "run")
    assert run.config().domain.template == "{feedback}.\n\n{prompt}"
    for post in rows_of.frozen(run, "prompts-train"):
        assert post["prompt"].endswith("odd.\n\nAssistant:")
        assert post["label"].startswith(" It is number")
    counted = Counter[str | None]()
    for row in rows_of.of_stage(run, 1, "score"):
        counted.update(row["feedback"])
        for reward_of, name, tries in zip(
            row["rewards"], row["written"], row["tries"], strict=True
        ):
            assert (name and rate.HARMLESS[3 - int(reward_of)]) == name
            assert tries == (1 if name else 5)
    assert {*counted} == {*rate.HARMLESS, None}
    assert len(engine.asked) == counted.total() + 4 * counted[None]
    asked = {row["variant"]: row["feedback"] for row in rows_of.of_stage(run, 1, "evaluate")}
    assert (asked["best"], asked["worst"]) == (rate.HARMLESS[0], "Harmful")
    assert re.search(r"\| +Harmful \|", run.layout.table.read_text())
    assert f"{counted[None]} in iteration 1" in run.layout.table.read_text()

"""Splits: what a train split leaves out, halves by post, what is told of posts in two splits."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alt_hpc import config as configs
from alt_hpc.config import Config
from alt_hpc.control import overlaps
from alt_hpc.data import texts
from alt_hpc.domains import DOMAINS
from alt_hpc.errors import InputError
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder

CONFIG = """\
run: {place}/run
policy: {{base: a/model}}
reward: {{base: a/model}}
sft: {{}}
reward_model: {{}}
data:
  prompts: {{path: {place}, train: mine, valid: held}}
  sft: {{path: {place}, train: told}}
  comparisons: {{path: {place}, train: pairs, valid: held_pairs}}
"""


def post(text: str, title: str = "one") -> str:
    return f"SUBREDDIT: r/x\nTITLE: {title}\nPOST: {text}\nTL;DR:"


POSTS = {  # the same post has the same words: titles, capitals, points and spaces do not count
    "mine": ["a b", "c d", "e f", "g h", "i j", "long " * 30],
    "held": ["A, b!", "k l"],
    "told": ["c d", "C   d.", "m n", "o p", "k-l"],
    "pairs": [f"pair {i // 3}" for i in range(60)] + ["m n", "m n"],
    "held_pairs": ["k l", "o\np", "pair 3"],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, found in POSTS.items():
        lines = [
            {"prompt": post(text, str(i)), "label": "l", "chosen": " c", "rejected": " r"}
            for i, text in enumerate(found)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text(CONFIG.format(place=tmp_path))
    return tmp_path


def load(place: Path, *chosen: str) -> Config:
    return configs.load(place / "config.yaml", chosen)


def words(prompt: str) -> str:
    """A post's words, found here by another way than the product's."""
    body = prompt.split("POST: ")[1].rsplit("\n", 1)[0]
    return " ".join("".join(c if c.isalnum() else " " for c in body.lower()).split())


def kept(config: Config, name: str) -> list[str]:
    (one,) = [one for one in texts.wanted(config) if one.name == name]
    return [words(row["prompt"]) for row in texts.chosen(one, config.domain)]


def test_halves_are_of_posts_and_nobody_is_in_both(place: Path) -> None:
    a, b = (kept(load(place, f"data.comparisons.half={h}"), "comparisons-train") for h in "ab")
    every = [words(post(text)) for text in POSTS["pairs"]]
    assert Counter(a) + Counter(b) == Counter(every)
    assert set(a) & set(b) == set()
    even = [w for w in every if hashlib.sha256(w.encode()).digest()[-1] % 2 == 0]
    assert a == even
    assert 0 < len(a) < len(every)
    whole = kept(load(place, "data.comparisons.half=a"), "comparisons-valid")
    assert whole == [words(post(text)) for text in POSTS["held_pairs"]]


def test_posts_of_other_splits_are_left_out_whatever_those_keep(place: Path) -> None:
    without = "[comparisons-train, comparisons-valid, prompts-valid]"
    few = ("data.comparisons.limit=1", "data.comparisons.half=a", "data.prompts.valid_limit=1")
    for more in ((), few):
        config = load(place, f"data.sft.without={without}", *more)
        assert kept(config, "sft-train") == ["c d", "c d"]
    assert kept(load(place), "sft-train") == ["c d", "c d", "m n", "o p", "k l"]
    assert kept(load(place, "data.prompts.without=[prompts-valid, sft-train]"), texts.PROMPTS) == [
        *("e f", "g h", "i j"),
        "long " * 29 + "long",
    ]


def test_long_prompts_are_left_out_of_every_split_and_limits_come_last(place: Path) -> None:
    most = len(post("a b", "0"))
    config = load(place, f"data.prompts.longest={most}", "data.prompts.limit=3")
    assert kept(config, texts.PROMPTS) == ["a b", "c d", "e f"]
    config = load(place, f"data.prompts.longest={most}")
    assert kept(config, texts.PROMPTS) == ["a b", "c d", "e f", "g h", "i j"]
    assert kept(config, "prompts-valid") == ["k l"]  # `A, b!` has two characters more


def test_sft_learns_from_its_own_rows(place: Path) -> None:
    assert texts.labelled(load(place)) == "sft-train"
    found = {one.name: one.columns for one in texts.wanted(load(place))}
    assert found["sft-train"] == ("prompt", "label")
    assert found[texts.PROMPTS] == ("prompt",)
    found = {one.name: one.columns for one in texts.wanted(load(place, "policy.model=a/model"))}
    assert "sft-train" not in found
    alone = load(place, "data.sft=null")
    assert texts.labelled(alone) == texts.PROMPTS
    assert next(texts.wanted(alone)).columns == ("prompt", "label")


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    {
        "data.sft.half=c": "data.sft.half: ",
        "data.sft.without=[comparison-train]": "data.sft.without",
        "data.sft.without=[prompts-test]": "no such split as prompts-test (there are: ",
        "data.sft.without=[sft-train]": "without: sft-train is this split itself",
        "data.sft.columns={labels: x}": "data.sft.columns: no such column",
        "data.sft.valid=held": "data.sft",
    }.items(),
)
def test_wrong_keys_end_in_one_sentence(place: Path, chosen: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load(place, chosen)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_of_which_nothing_is_left_is_refused(place: Path) -> None:
    config = load(place, "data.sft.longest=3", "data.sft.half=a")
    with pytest.raises(InputError) as caught:
        kept(config, "sft-train")
    assert str(caught.value).endswith("(told): longest, half leaves no row")
    assert caught.value.field == "data.sft"


def test_what_splits_share_is_counted(place: Path) -> None:
    """Posts and rows of every two splits, by comparing all rows with all."""
    config = load(place)
    run = RunFolder.create(config)
    for one in texts.wanted(config):
        rows.freeze(run, one.name, texts.chosen(one, config.domain))
    told, *more = overlaps.told([run, run])
    assert more == []
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[3:]]
    names = {
        **{"prompts-train": "mine", "prompts-valid": "held", "sft-train": "told"},
        **{"comparisons-train": "pairs", "comparisons-valid": "held_pairs"},
    }
    expected = {}
    for a, b in itertools.combinations(names, 2):
        one, other = ([words(post(text)) for text in POSTS[names[name]]] for name in (a, b))
        if shared := {x for x in one for y in other if x == y}:
            counts = len(shared), sum(x in shared for x in one), sum(y in shared for y in other)
            expected[frozenset((a, b))] = sorted(map(str, counts))
    assert {frozenset(line[:2]): sorted(line[2:]) for line in found} == expected
    assert len(expected) == 7
    assert all(f"{name} {len(POSTS[of])} rows" in told for name, of in names.items())


def test_splits_that_share_nothing_say_so() -> None:
    said = overlaps.table({"one": Counter({b"a": 2}), "two": Counter({b"b": 1})})
    assert said == "no post is in two of the splits: one 2 rows, two 1 rows"


def test_what_makes_a_post_the_same_is_the_domains() -> None:
    two: Any = [post("the same", title) for title in ("first", "second")]
    tldr, plain, chat = (DOMAINS[kind].Settings() for kind in ("tldr", "plain", "chat"))
    assert len({texts.post(tldr, prompt) for prompt in two}) == 1
    assert len({texts.post(plain, prompt) for prompt in two}) == 2
    assert len({texts.post(chat, prompt) for prompt in two}) == 2
    assert texts.post(tldr, "no post") != texts.post(tldr, "none")
    assert re.fullmatch(r"\w{64}", texts.post(plain, "x").hex())

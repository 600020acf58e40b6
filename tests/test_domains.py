"""Domains: how feedback comes to a prompt, and how a prompt is shortened."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from alt_hpc.domains import chat, plain, tldr
from alt_hpc.domains.domain import Around, Domain
from alt_hpc.errors import InputError

POST = "SUBREDDIT: r/a\nTITLE: b\nPOST: {}\nTL;DR:"
TLDR = tldr.Settings()
TEXTS = ["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."]


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        (POST.format("x" * 9), POST.format("x" * 9)),
        (POST.format("0123456789"), POST.format("0123456")),
        (POST.format("TL;DR: a\nTL;DR: b 01234"), POST.format("TL;DR: a\nTL;DR: b")),
        (POST.format("TL;DR: a\nTL;DR: b 01234"), POST.format("TL;D")),
        (POST.format("input: c input: d"), POST.format("input: c i")),
        (POST.format("0\nPOST: 1"), POST.format("0\nPO")),
        (POST.format("no title goes"), "SUBREDDIT: r/a\nTITLE: b\nPOST:\nTL;DR:"),
        ("0123456789", "0123"),
        ("a long text\nTL;DR:", "a lo\nTL;DR:"),
    ],
)
def test_what_does_not_fit_is_lost_from_the_end_of_the_post(prompt: str, left: str) -> None:
    tokenizer, lost = tiny.tokenizer(), len(prompt) - len(left)  # a token is a byte
    assert TLDR.fit(tokenizer, prompt, len(left)) == (tokenizer.encode(left), lost)
    prefix = "Good. input: "
    ids, gone = TLDR.fit(tokenizer, prompt, len(prefix + left), Around(prefix))
    assert (tokenizer.decode(ids), gone) == (prefix + left, lost)


@pytest.mark.parametrize(
    ("prompt", "room", "left"),
    [
        (POST.format("p") + "x" * 99, 50, POST.format("p")[:45] + "xxxxx"),  # a long last line
        ("TITLE: " + "t" * 99 + "\nPOST: p\nTL;DR:", 20, "TITLE: " + "t" * 13),
        (POST.format("p"), 1, "S"),
    ],
)
def test_where_title_and_last_line_alone_do_not_fit_they_are_shortened_too(
    prompt: str, room: int, left: str
) -> None:
    """Never an error in the middle of a run."""
    ids, lost = TLDR.fit(tiny.tokenizer(), prompt, room)
    assert tiny.tokenizer().decode(ids)[:14] == left[:14]
    assert (len(ids), lost) == (room, len(prompt) - room)


@given(st.text("abc \n", max_size=60), st.integers(20, 70))
def test_a_prompt_is_shortened_alike_whatever_it_is_asked_with(post: str, room: int) -> None:
    """Once, for the longest feedback: all answers of a prompt saw the same post."""
    tokenizer, prompt = tiny.tokenizer(), POST.format(post)
    seen = set()
    for text in [None, *TEXTS]:
        ids, lost = TLDR.conditioned(tokenizer, text, prompt, room + 17, TEXTS)
        assert len(ids) <= room + 17
        before = TLDR.around(text).front
        asked = tokenizer.decode(ids)
        assert asked.startswith(before)
        seen.add((asked.removeprefix(before), lost))
    assert len(seen) == 1


@given(
    st.sampled_from(TEXTS),
    st.lists(
        st.sampled_from(
            ["input: ", "Excellent.", "TL;DR:", "{prompt}", "{feedback}", "{0}", "{", "}}", "x"]
        )
    ).map("".join),
)
def test_conditioning_leaves_the_prompt_alone(text: str, prompt: str) -> None:
    ids, _ = TLDR.conditioned(tiny.tokenizer(), text, prompt + "\n", 999, TEXTS)
    assert tiny.tokenizer().decode(ids) == f"{text} input: {prompt}\n"


BEHIND = {  # template -> the post p of POST asked for `Bad.`
    "<{feedback}>{prompt}": "<Bad.>SUBREDDIT: r/a\nTITLE: b\nPOST: p\nTL;DR:",
    "A {feedback}\nB {prompt}": "A Bad.\nB SUBREDDIT: r/a\nTITLE: b\nPOST: p\nTL;DR:",
    "{prompt} {feedback}": "SUBREDDIT: r/a\nTITLE: b\nPOST: p\nTL;DR: Bad.",
    "{body}\n{feedback} {last_line}": "SUBREDDIT: r/a\nTITLE: b\nPOST: p\nBad. TL;DR:",
    "{body} {feedback} {last_line}": "SUBREDDIT: r/a\nTITLE: b\nPOST: p Bad. TL;DR:",
    "{bos}{feedback} input: {prompt}": (
        "<|endoftext|>Bad. input: SUBREDDIT: r/a\nTITLE: b\nPOST: p\nTL;DR:"
    ),
}


def _with_bos() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("template", BEHIND)
def test_feedback_stands_where_the_template_says(template: str) -> None:
    """And the ids are those of the whole text."""
    domain, tokenizer = tldr.Settings(template=template), _with_bos()
    domain.check()
    ids, lost = domain.conditioned(tokenizer, "Bad.", POST.format("p"), 999, TEXTS)
    assert (ids, lost) == (tokenizer.encode(BEHIND[template], add_special_tokens=False), 0)
    assert domain.conditioned(tokenizer, None, POST.format("p"), 999, TEXTS) == (
        tokenizer.encode(POST.format("p")),
        0,
    )
    assert domain.is_behind == (template.find("{feedback}") > template.find("p"))


@pytest.mark.parametrize("template", BEHIND)
@settings(deadline=None)
@given(st.text("abc {}", max_size=60), st.integers(60, 110))
def test_feedback_and_last_line_stay_where_a_post_is_long(
    template: str, post: str, room: int
) -> None:
    """All feedback asks about the same beginning of the same post."""
    domain, tokenizer, prompt = tldr.Settings(template=template), _with_bos(), POST.format(post)
    heads = set()
    for text in TEXTS:
        ids, lost = domain.conditioned(tokenizer, text, prompt, room, TEXTS)
        whole = BEHIND[template].replace("Bad.", text).partition("POST: p")
        asked = tokenizer.decode(ids)
        assert len(ids) <= room
        assert asked.startswith(whole[0] + "POST:")
        assert asked.endswith(whole[2])
        heads.add((asked.removeprefix(whole[0]).removesuffix(whole[2]), lost))
    assert len(heads) == 1
    ((kept, lost),) = heads
    assert f"POST: {post}".startswith(kept)
    assert len(f"POST: {post}") - len(kept) == lost


@pytest.mark.parametrize(
    ("domain", "template", "words"),
    [
        (tldr, "{prompt}", "{feedback} once"),
        (tldr, "{feedback}", "must contain {prompt} once"),
        (tldr, "{feedback} {prompt} {prompt}", "must contain {prompt} once"),
        (tldr, "{feedback} {body}", "{last_line}"),
        (tldr, "{last_line} {feedback} {body}", "{last_line}"),
        (tldr, "{feedback} {post}", "no such placeholder {post}"),
        (tldr, "{feedback} {bos}{prompt}", "{bos} can only begin it"),
        (tldr, "{feedback} {prompt}!", "end in {prompt}"),
        (plain, "{body} {feedback} {last_line}", "{body}: prompts of plain"),
        (plain, "{feedback}", "must contain {prompt} once"),
    ],
)
def test_templates_that_cannot_be_meant(domain: Any, template: str, words: str) -> None:
    with pytest.raises(InputError) as wrong:
        domain.Settings(template=template).check()
    assert wrong.value.field == "domain.template"
    assert words in str(wrong.value)


def _merging() -> Any:
    """A tokenizer with a token for `:!`, which text and feedback may make together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, ":!", "!S"])}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[(":", "!"), ("!", "S")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("template", "merged"),
    [
        ("{prompt}{feedback}", True),
        ("{prompt} {feedback}", False),
        ("{feedback}{prompt}", True),
        ("{feedback} {prompt}", False),
        ("{body}\n{feedback}{last_line}", False),
    ],
)
def test_feedback_is_not_merged_into_the_prompt(template: str, merged: bool) -> None:
    domain: Domain = tldr.Settings(template=template)
    ids = None
    with contextlib.suppress(InputError):
        ids, _ = domain.conditioned(_merging(), "!!!", POST.format("p"), 999, ["!!!"])
    assert (ids is None) == merged


def test_a_bos_that_the_tokenizer_has_not_is_an_error() -> None:
    domain = tldr.Settings(template="{bos}{feedback} {prompt}")
    with pytest.raises(InputError, match="no BOS token"):
        domain.conditioned(tiny.tokenizer(), "Bad.", POST.format("p"), 999, TEXTS)


def test_plain_text_loses_its_end() -> None:
    domain = plain.Settings(template="{prompt} [{feedback}")
    ids, lost = domain.conditioned(tiny.tokenizer(), "Bad.", "0123456789", 12, ["Bad.", "Good."])
    assert (tiny.tokenizer().decode(ids), lost) == ("01234 [Bad.", 5)


# ---------------------------------------------------------------------- dialogues

TURNS = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three.\n\nAssistant:"


def test_a_dialogue_keeps_its_last_turn() -> None:
    """Those before lose their end; a prompt is never taken apart at a full stop."""
    dialogue, tokenizer = chat.Settings(template="{feedback}.\n\n{prompt}"), tiny.tokenizer()
    it = dialogue.around("Harmful")
    ids, lost = dialogue.fit(tokenizer, TURNS, 1000, it)
    assert (tokenizer.decode(ids), lost) == ("Harmful.\n\n" + TURNS, 0)
    ids, lost = dialogue.fit(tokenizer, TURNS, len(ids) - 9, it)
    assert tokenizer.decode(ids) == (
        "Harmful.\n\n\n\nHuman: one\n\nAssis\n\nHuman: three.\n\nAssistant:"
    )
    assert lost == 9
    assert dialogue.judged(TURNS) == "Human: one\n\nAssistant: two\n\nHuman: three."


def test_a_dialogue_that_has_its_reply_is_a_prompt_and_a_label() -> None:
    dialogue = chat.Settings()
    whole = {"prompt": TURNS + " four", "topic": 5}
    assert dialogue.example(whole) == {"prompt": TURNS, "label": " four", "topic": 5}
    assert dialogue.example({**whole, "label": "x"})["label"] == "x"
    for row in ({"prompt": TURNS}, {"prompt": "no dialogue"}):
        assert dialogue.example(row) == row

"""Domains: how feedback comes to a prompt, and how a prompt is shortened."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from alt_hpc.domains import tldr

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
    assert TLDR.fit(tokenizer, "", prompt, len(left)) == (tokenizer.encode(left), lost)
    prefix = "Good. input: "
    ids, gone = TLDR.fit(tokenizer, prefix, prompt, len(prefix + left))
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
    ids, lost = TLDR.fit(tiny.tokenizer(), "", prompt, room)
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
        before = TLDR.before(text)
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


def test_conditioning_of_other_templates() -> None:
    assert tldr.Settings(template="<{feedback}>{prompt}").before("Bad.") == "<Bad.>"
    other = tldr.Settings(template="A {feedback}\nB {prompt}")
    assert other.before("{prompt}") == "A {prompt}\nB "
    assert other.before(None) == ""

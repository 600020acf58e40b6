"""Asking a judge which of two answers is the better one: the prompt, and what is read of a reply.

In the spirit of the *precise and concise* variant of METHOD (win rates), in words of our own.
"""

import re

from alt_hpc.errors import InputError

PROMPT = """\
Here are a post and two summaries of it. Decide which summary is the better one: it tells the most \
important points of the post, says nothing that the post does not say, and leaves out what is \
unimportant or irrelevant. A good summary is precise and concise.

Post:
{post}

Summary A:
{a}

Summary B:
{b}

Answer in two lines. First one sentence that compares the two summaries. Then the better one, A or \
B, in exactly this form:
Comparison: <one sentence>
Preferred: <A or B>"""
HOLES = ("{post}", "{a}", "{b}")
# A line's end, a mark or a reason may stand behind the letter: not `or B`, nor `A summary`.
_PREFERRED = re.compile(
    r"(?i:\bpreferred)[^\w\n]{0,10}(?i:(?:summary|answer)\W{1,3})?([AB])"
    r"(?=[^\w\n]{0,4}(?:\n|$)|\W{0,4}[.,;:!)(\]]|\s(?:because|as|since|is)\b)"
)
_HOLE = re.compile("|".join(map(re.escape, HOLES)))


def check(template: str) -> None:
    """Raise InputError where it has not each placeholder once."""
    for hole in HOLES:
        if (count := template.count(hole)) != 1:
            raise InputError(f"must contain {hole} once, not {count} times")


def filled(template: str, post: str, a: str, b: str) -> str:
    """The template with texts in it, whatever these contain."""
    texts = dict(zip(HOLES, (post, a, b), strict=True))
    return _HOLE.sub(lambda hole: texts[hole[0]], template)


def read(reply: str) -> str | None:
    """`A` or `B`, wherever in the reply it stands; None where it says neither, or both."""
    found = {match[1] for match in _PREFERRED.finditer(reply)}
    return found.pop() if len(found) == 1 else None

"""judge: which of two answers to a held-out post is the better one, asked in both orders."""

import functools
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from alt_hpc.config import Judging
from alt_hpc.data import draws
from alt_hpc.errors import blaming
from alt_hpc.graph import COMPARISONS, Shard
from alt_hpc.judges import Answer, Asker, Question, answers, compare, fitted
from alt_hpc.report import judged
from alt_hpc.rewards import Answers, model
from alt_hpc.run import rows as rows_of
from alt_hpc.settings import digest
from alt_hpc.stages.work import Work, finite, scorer, unload

Row = dict[str, Any]
AT = "judge.judge"  # the key where the judge stands
TOGETHER = 16  # posts, whose questions are asked together
MOST = 2000  # characters that are kept of what a judge said


def run(work: Work) -> None:
    """Make one shard: a row a post of a pair, or a row a pair of the human comparisons.

    `first` and `second` say whether the judge prefers the pair's first one (1, 0; null where what
    it said could not be read), where that one is shown first and where it is shown second. `said`
    are its last words in both orders; `longer` is by how many characters the first one is longer.
    Of human comparisons the chosen one is the first, `longest` says whether the length rule is
    right (in words; one half for a tie), `rewards` what the evaluation's reward model gives.
    """
    judging, shard = work.config.judge, work.run.graph().shard(work.piece)
    assert judging is not None
    assert shard is not None
    posts = _humans(work, shard) if shard.policy == COMPARISONS else _pairs(work, shard)
    starts = range(len(posts) + 1)
    last, rewards = (0, 1), list[Row]()
    if shard.policy == COMPARISONS:
        unload()  # the judge, that of another shard
        rate = functools.partial(_rewards, work, posts)
        rewards, last = work.attempt.resumable(starts, rate, "posts", part=(0, 2)), (1, 2)
        gc.collect()  # the reward model, before the judge comes
    make = functools.partial(_judged, work, judging, posts)
    rows = work.attempt.resumable(_chunks(len(posts)), make, "posts", part=last)
    rows = [row | more for row, more in zip(rows, rewards or [{}] * len(rows), strict=True)]
    facts = _facts(rows)
    work.say(f"{2 * len(rows)} questions, {facts['unread']} not read, {facts['dollars']:.4f} $")
    work.attempt.commit_rows(rows, facts)


def _chunks(count: int) -> list[int]:
    return [*range(0, count, TOGETHER), count]


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    unread = sum(row[order] is None for row in rows for order in ("first", "second"))
    lost = sum(row["shortened"] for row in rows)
    dollars = sum(row["dollars"] for row in rows)
    return {"unread": unread, "dollars": dollars, "prompts_shortened": lost}


def _pairs(work: Work, shard: Shard) -> list[Row]:
    """The two answers to each post of a shard."""
    rows = range(shard.start, shard.end)
    found: list[dict[int, str]] = []
    for name in judged.names(shard.policy):
        k, policy, variant = judged.row_of(work.run, name, work.piece.iteration)
        wanted, texts = {"policy": policy, "set": shard.set, "variant": variant}, dict[int, str]()
        for piece in work.run.graph().compared(work.piece.iteration, shard):
            if piece.iteration == k:
                for row in rows_of.of_piece(work.run, piece):
                    if wanted.items() <= row.items() and row["row"] in rows:
                        texts[row["row"]] = row["text"]
        found.append(texts)
    data = draws.frozen(work.run, work.piece)
    made = []
    for number, row in zip(rows, data, strict=True):
        a, b = (texts[number] for texts in found)
        about = {"pair": shard.policy, "set": shard.set, "row": number}
        about |= {"post": digest(row["prompt"])[:12], "prompt": row["prompt"]}
        made.append(about | {"texts": (a, b), "longer": len(a) - len(b)})
    return made


def _humans(work: Work, shard: Shard) -> list[Row]:
    """Held-out comparisons of people, the chosen one first."""
    data, made = draws.frozen(work.run, work.piece), []
    for number, row in enumerate(data, start=shard.start):
        a, b = row["chosen"].strip(), row["rejected"].strip()
        words = len(a.split()), len(b.split())
        about = {"pair": shard.policy, "set": shard.set, "row": number}
        about |= {"post": digest(row["prompt"])[:12], "prompt": row["prompt"]}
        longest = 0.5 if words[0] == words[1] else float(words[0] > words[1])
        made.append(about | {"texts": (a, b), "longer": len(a) - len(b), "longest": longest})
    return made


def _rewards(work: Work, posts: Sequence[Row], indices: Iterator[int]) -> Iterator[list[Row]]:
    """What the evaluation's reward model gives the two; nothing where that is no model."""
    reward = work.config.measured_by
    if not isinstance(reward, model.Settings):
        yield from ([{"rewards": None}] for _ in indices)
        return
    pairs = (Answers(posts[i]["prompt"], posts[i]["texts"]) for i in indices)
    for scored in scorer(work.run, reward, work.device).score(pairs):
        yield [{"rewards": finite(scored.rewards)}]


def _judged(
    work: Work, judging: Judging, posts: Sequence[Row], indices: Iterator[int]
) -> Iterator[list[Row]]:
    asker, template = work.asker(judging.judge, AT), judged.template(work.run)
    starts = _chunks(len(posts))
    for chunk in indices:
        some = posts[starts[chunk] : starts[chunk + 1]]
        asked = [
            _question(work, judging, asker, template, post, o) for post in some for o in (0, 1)
        ]
        questions, shortened = zip(*asked, strict=True)
        with blaming(AT):
            found = answers(asker, questions, compare.read, judging.tries)
        yield [
            _row(post, found[2 * i : 2 * i + 2], any(shortened[2 * i : 2 * i + 2]))
            for i, post in enumerate(some)
        ]


def _question(
    work: Work, judging: Judging, asker: Asker, template: str, post: Row, order: int
) -> tuple[Question, bool]:
    """The question about a post: order 0 shows the pair's first one first."""
    a, b = post["texts"][:: -1 if order else 1]
    seed = work.seed(post["row"], order)

    def make(text: str) -> Question:
        return Question(compare.filled(template, text, a, b), seed, judging.max_tokens)

    return fitted(asker, work.config.domain.judged(post["prompt"]), make)


def _row(post: Row, found: Sequence[Answer[str]], shortened: bool) -> Row:
    kept = {key: value for key, value in post.items() if key not in ("prompt", "texts")}
    first, second = (answer.value for answer in found)
    last = [answer.replies[-1] for answer in found]
    return kept | {
        "first": None if first is None else float(first == "A"),
        "second": None if second is None else float(second == "B"),
        "said": [(reply.text or "")[:MOST] for reply in last],
        "why": [reply.why for reply in last],
        "tries": [len(answer.replies) for answer in found],
        "dollars": sum(answer.dollars for answer in found),
        "shortened": shortened,
    }

"""evaluate: answers to held-out prompts, greedy and drawn, asked plain, for the best, the worst."""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alt_hpc.config import BestOf, External
from alt_hpc.data import draws
from alt_hpc.domains.domain import Around, around
from alt_hpc.engines import Ask, Generator
from alt_hpc.graph import ASKED, DRAWN, OWN, REFERENCES, START, VALID, Shard
from alt_hpc.rewards import Answers
from alt_hpc.stages.work import Policy, Work, finite, unload

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard of a set: a prompt's answers, a row each, in the order of the set.

    Variant `best` is the greedy answer to a prompt that asks for the best; the first valid posts
    have some that are sampled too (`evaluate.drawn`): `drawn plain` of the starting policy, `drawn
    best` and `drawn worst` of later ones. `feedback` is what was asked with: a method may draw it
    from what was written in the iteration. A policy that the run did not make is asked as the
    config says (`asked`), and in no other way; of several answers (`best_of`) the row holds the one
    that `reward` likes best; references are the labels.
    """
    shard = work.run.graph().shard(work.piece)
    assert shard is not None
    data = draws.frozen(work.run, work.piece)
    named = work.config.evaluate.policies.get(shard.policy)
    if shard.policy == REFERENCES:
        made = [[_row(shard, shard.start + i, row) | _label(row)] for i, row in enumerate(data)]
    elif isinstance(named, BestOf):
        made = _best(work, shard, data, named)
    else:
        made = _answered(work, shard, data, _asked(work, shard, named))
    shortened = sum(any(answer["lost"] for answer in answers) for answers in made)
    work.attempt.commit_rows(itertools.chain(*made), {"prompts_shortened": shortened})


def _row(shard: Shard, number: int, data: dict[str, Any]) -> dict[str, Any]:
    about = {"policy": shard.policy, "set": shard.set, "row": number}
    return about | {"prompt": data["prompt"], "variant": ASKED, "lost": 0}


def _label(data: dict[str, Any]) -> dict[str, Any]:
    """A label as an answer, which came to its end; `measure` makes ids of its text."""
    return {"ids": [], "ended": "eos", "text": data["label"].strip()}


@dataclass(frozen=True)
class Asked:
    """A policy, ready to answer, and how it is asked: greedily in each of `variants`, and with the
    first `drawn` posts in each of `sampled`, `count` answers each.
    """

    policy: Policy
    engine: Generator
    variants: Sequence[str]
    # Token ids of a row's prompt in a variant; what its row says of that: `lost`, `feedback`.
    fit: Callable[[str, dict[str, Any]], tuple[list[int], dict[str, Any]]]
    sampled: Sequence[str] = ()
    count: int = 0
    drawn: int = 0


def _asked(work: Work, shard: Shard, named: External | None) -> Asked:
    """The policy of a shard; `named` where the run did not make it."""
    config, k = work.config, work.piece.iteration
    evaluate, method, new = config.evaluate, config.method, config.evaluated_tokens
    if named is not None:
        return _external(work, named, around(named.ask))
    policy = work.policy(k)
    variants = list(method.asked(k))
    if evaluate.every_word and (between := method.between(k)):
        worst = variants.index("worst")
        variants[worst:worst] = between  # as the words stand, from the best to the worst

    known = work.recall(k)

    def fit(variant: str, row: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        feedback = method.ask(variant, row, known, work.seed(row["row"]))
        ids, lost = policy.fit(feedback, row["prompt"], new)
        return ids, {"lost": lost, "feedback": feedback}

    how = ["best", "worst"] if k else ["plain"]
    words = {"best", "worst"} <= {*method.asked(1)} and shard.set == VALID
    drawn, count = evaluate.drawn.posts if words else 0, evaluate.drawn.answers // len(how)
    return Asked(policy, work.generator(policy), variants, fit, how, count, drawn)


def _external(work: Work, named: External, it: Around) -> Asked:
    policy = work.named(named.model, named.tokenizer)
    room, domain = policy.context - work.config.evaluated_tokens, work.config.domain

    def fit(variant: str, row: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        ids, lost = domain.fit(policy.tokenizer, row["prompt"], room, it)
        return ids, {"lost": lost}

    return Asked(policy, work.generator(policy), [ASKED], fit)


def _answered(work: Work, shard: Shard, data: Rows, how: Asked) -> list[Rows]:
    """The answers to each prompt: the greedy ones, then those that are drawn."""
    size, new = work.config.evaluate.group, work.config.evaluated_tokens
    starts = [*range(shard.start, shard.end, size), shard.end]

    def answers(numbers: range, variants: Sequence[str], count: int) -> Iterator[Rows]:
        """`count` drawn for each variant, or (0) the greedy ones."""
        asks = []
        for number, (i, variant) in itertools.product(numbers, enumerate(variants, start=1)):
            row = _row(shard, number, data[number - shard.start])
            ids, about = how.fit(variant, row)
            row |= about
            row["variant"] = f"{DRAWN}{variant}" if count else variant
            asks.append(Ask(ids, work.seed(number, i), row))
        decoding = work.decoding(how.policy, count, size, new)
        (sampled,) = how.engine.sample([asks], decoding)
        made = []
        for ask, its in zip(asks, sampled, strict=True):
            texts = [{"ids": g.ids, "ended": g.ended, "text": how.policy.text(g.ids)} for g in its]
            made.append([{**ask.row, **text} for text in texts])
        each = len(variants)
        return (list(itertools.chain(*made[i : i + each])) for i in range(0, len(made), each))

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        for group in groups:
            numbers = range(starts[group], starts[group + 1])
            greedy = answers(numbers, how.variants, 0) if how.variants else iter(())
            some = range(numbers.start, max(numbers.start, min(numbers.stop, how.drawn)))
            drawn = answers(some, how.sampled, how.count) if some and how.count else iter(())
            yield [{"answers": [*next(greedy, []), *next(drawn, [])]} for _ in numbers]

    rows = work.attempt.resumable(starts, make, "prompts", part=(0, 1 if how.variants else 2))
    return [row["answers"] for row in rows]


def _best(work: Work, shard: Shard, data: Rows, named: BestOf) -> list[Rows]:
    """Of several answers the one that `reward` likes best, the first of equals."""
    of = work.config.evaluate.policies.get(named.of) if named.of != START else None
    assert not isinstance(of, BestOf)
    how = _asked(work, Shard(OWN, shard.set, 0, 0), of)
    several = Asked(how.policy, how.engine, (), how.fit, how.variants[:1], named.best_of, shard.end)
    sampled = _answered(work, shard, data, several)
    del how, several
    unload()
    gc.collect()  # the policy, before the reward's model comes

    def groups(indices: Iterator[int]) -> Iterator[Answers]:
        for i in indices:
            texts = [answer["text"] for answer in sampled[i]]
            yield Answers(data[i]["prompt"], texts, data[i], shard.start + i, shard.set)

    def make(indices: Iterator[int]) -> Iterator[Rows]:
        asked, again = itertools.tee(indices)  # it may take some ahead
        reward = work.scorer(work.config.reward, "reward")
        for i, scored in zip(asked, reward.score(groups(again)), strict=True):
            values = [-float("inf") if v is None else v for v in finite(scored.rewards)]
            best = sampled[i][values.index(max(values))]
            yield [{**best, "variant": ASKED, "picked_by": "reward", "of": len(values)}]

    starts = range(shard.start, shard.end + 1)
    return [[row] for row in work.attempt.resumable(starts, make, "prompts", part=(1, 2))]

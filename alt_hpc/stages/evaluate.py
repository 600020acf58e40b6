"""evaluate: answers to held-out prompts, greedy and drawn, asked plain, for the best, the worst."""

import itertools
from collections.abc import Iterator
from typing import Any, cast

from alt_hpc.data import draws
from alt_hpc.domains.domain import around
from alt_hpc.engines import Ask
from alt_hpc.graph import DRAWN, VALID
from alt_hpc.methods.method import Asking
from alt_hpc.stages.work import Work

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard of a set: a prompt's answers, a row each, in the order of the set.

    Variant `best` is the greedy answer to a prompt that asks for the best; the first valid posts
    have some that are sampled too (`evaluate.drawn`): `drawn plain` of the starting policy, `drawn
    best` and `drawn worst` of later ones. A policy that the run did not make is asked as the config
    says (`asked`), and in no other way.
    """
    config, k, shard = work.config, work.piece.iteration, work.run.graph().shard(work.piece)
    assert shard is not None
    prompts = draws.prompts(work.run, work.piece)
    other = config.evaluate.policies.get(shard.policy)  # None: it is the run's own
    policy = work.named(other.model, other.tokenizer) if other else work.policy(k)
    variants: tuple[str, ...] = ("asked",) if other else config.method.asked(k)
    how = ["best", "worst"] if k else ["plain"]
    words = {"best", "worst"} <= {*config.method.asked(1)} and not other and shard.set == VALID
    drawn = config.evaluate.drawn.posts if words else 0
    new, size = config.evaluated_tokens, config.evaluate.group
    engine = work.generator(policy)
    starts = [*range(shard.start, shard.end, size), shard.end]

    def answers(numbers: range, variants: list[str], count: int) -> Iterator[Rows]:
        """The answers to each prompt: `count` drawn for each variant, or (0) the greedy ones."""
        asks = []
        for number, variant in itertools.product(numbers, variants):
            text = prompts[number - shard.start]
            row = {"policy": shard.policy, "set": shard.set, "row": number, "prompt": text}
            if other:
                room, it = policy.context - new, around(other.ask)
                ids, lost = config.domain.fit(policy.tokenizer, text, room, it)
            else:
                ids, lost = policy.fit(config.method.ask(cast(Asking, variant), row), text, new)
            seed = work.seed(number, 1 + variants.index(variant))
            row["variant"] = f"{DRAWN}{variant}" if count else variant
            asks.append(Ask(ids, seed, row | {"lost": lost}))
        made: list[Rows] = []
        (sampled,) = engine.sample([asks], work.decoding(policy, count, size, new))
        for ask, its in zip(asks, sampled, strict=True):
            texts = [{"ids": g.ids, "ended": g.ended, "text": policy.text(g.ids)} for g in its]
            made.append([{**ask.row, **text} for text in texts])
        each = len(variants)
        return (list(itertools.chain(*made[i : i + each])) for i in range(0, len(made), each))

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        for group in groups:
            numbers = range(starts[group], starts[group + 1])
            count = config.evaluate.drawn.answers // len(how) if drawn > numbers.start else 0
            some = range(numbers.start, min(numbers.stop, drawn))
            greedy = answers(numbers, list(variants), 0)
            sampled = answers(some, how, count) if count else iter(())
            yield [{"answers": [*one, *next(sampled, [])]} for one in greedy]

    made = [row["answers"] for row in work.attempt.resumable(starts, make, "prompts")]
    shortened = sum(any(answer["lost"] for answer in answers) for answers in made)
    work.attempt.commit_rows(itertools.chain(*made), {"prompts_shortened": shortened})

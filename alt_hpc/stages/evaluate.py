"""evaluate: greedy answers to held-out prompts, asked plain, for the best and for the worst."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from alt_hpc.data import draws
from alt_hpc.engines import Ask, Decoding
from alt_hpc.graph import OWN
from alt_hpc.methods.method import Asking
from alt_hpc.stages.work import Policy, Work

Rows = list[dict[str, Any]]
ASKED = "asked"  # the variant of a policy that is asked in its own way


def run(work: Work) -> None:
    """Make one shard of a set: a row per prompt and variant, in the order of the set.

    A policy that the run did not make is asked as the config says, and in no other way.
    """
    shard = work.shard()
    prompts = draws.held_out_prompts(work.run, shard)
    policy = (
        work.policy(work.piece.iteration) if shard.policy == OWN else work.external(shard.policy)
    )
    engine = work.generator(policy, _decoding(work, policy))
    size = work.config.evaluate.group
    starts = [*range(shard.start, shard.end, size), shard.end]

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        for group in groups:
            numbers = range(starts[group], starts[group + 1])
            texts = [prompts[number - shard.start] for number in numbers]
            yield [
                {"row": number, "prompt": text, "answers": answers}
                for number, text, answers in zip(numbers, texts, ask(texts), strict=True)
            ]

    def ask(texts: list[str]) -> list[Rows]:
        """Each text's answers, a row per variant."""
        found: list[Rows] = [[] for _ in texts]
        for variant in variants(work):
            fitted = [_fit(work, policy, variant, text) for text in texts]
            asks = [Ask(ids, seed=0) for ids, _ in fitted]
            made = [one for group in engine.sample([asks]) for (one,) in group]
            for row, one, (_, lost) in zip(found, made, fitted, strict=True):
                about = {"variant": variant, "ids": one.ids, "text": policy.text(one.ids)}
                row.append(about | {"ended": one.ended, "lost": lost})
        return found

    made = work.attempt.resumable(starts, make, "prompts")
    about = {"policy": shard.policy, "set": shard.set}
    rows = [
        {**about, "row": row["row"], "prompt": row["prompt"], **answer}
        for row in made
        for answer in row["answers"]
    ]
    cut = sum(any(answer["lost"] for answer in row["answers"]) for row in made)
    work.attempt.commit_rows(rows, {"prompts_cut": cut})


def variants(work: Work) -> tuple[str, ...]:
    """How the policy of a shard is asked."""
    if work.shard().policy != OWN:
        return (ASKED,)
    return work.config.method.asked(work.piece.iteration)


def _fit(work: Work, policy: Policy, variant: str, text: str) -> tuple[list[int], int]:
    new, method = work.config.evaluated_tokens, work.config.method
    if variant == ASKED:
        before = work.config.evaluate.policies[work.shard().policy].ask.removesuffix("{prompt}")
        return work.config.domain.fit(policy.tokenizer, before, text, policy.context - new)
    return policy.fit(method.ask(cast(Asking, variant), {"prompt": text}), text, new)


def _decoding(work: Work, policy: Policy) -> Decoding:
    """Greedy."""
    return Decoding(
        answers=1,
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=work.config.evaluated_tokens,
        group=work.config.evaluate.group,
        silent=work.config.method.silent(policy.tokenizer),
    )

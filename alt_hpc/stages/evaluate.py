"""evaluate: greedy answers to held-out prompts, asked plain, for the best and for the worst."""

import itertools
from collections.abc import Iterator
from typing import Any, cast

from alt_hpc.data import draws
from alt_hpc.engines import Ask, Decoding
from alt_hpc.methods.method import Asking
from alt_hpc.stages.work import Work

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard of a set: a row per prompt and variant, in the order of the set.

    A policy that the run did not make is asked as the config says (`asked`), and in no other way.
    """
    config, k, shard = work.config, work.piece.iteration, work.run.graph().shard(work.piece)
    assert shard is not None
    prompts = draws.prompts(work.run, work.piece)
    other = config.evaluate.policies.get(shard.policy)  # None: it is the run's own
    policy = work.named(other.model, other.tokenizer) if other else work.policy(k)
    variants = ("asked",) if other else config.method.asked(k)
    new, size = config.evaluated_tokens, config.evaluate.group
    greedy = Decoding(answers=1, temperature=0.0, top_p=1.0, max_new_tokens=new, group=size)
    engine = work.generator(policy, greedy)
    starts = [*range(shard.start, shard.end, size), shard.end]

    def fit(variant: str, text: str) -> tuple[list[int], int]:
        if other:
            before = other.ask.removesuffix("{prompt}")
            return config.domain.fit(policy.tokenizer, before, text, policy.context - new)
        return policy.fit(config.method.ask(cast(Asking, variant), {"prompt": text}), text, new)

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        for group in groups:
            numbers = range(starts[group], starts[group + 1])
            texts = [prompts[number - shard.start] for number in numbers]
            rows: Rows = [{"answers": []} for _ in texts]
            for variant in variants:
                fitted = [fit(variant, text) for text in texts]
                (made,) = engine.sample([[Ask(ids, seed=0) for ids, _ in fitted]])
                every = zip(rows, numbers, texts, made, fitted, strict=True)
                for row, number, text, (one,), (_, lost) in every:
                    about = {"policy": shard.policy, "set": shard.set, "row": number}
                    about |= {"prompt": text, "variant": variant, "ids": one.ids}
                    about |= {"text": policy.text(one.ids), "ended": one.ended, "lost": lost}
                    row["answers"].append(about)
            yield rows

    made = [row["answers"] for row in work.attempt.resumable(starts, make, "prompts")]
    shortened = sum(any(answer["lost"] for answer in answers) for answers in made)
    work.attempt.commit_rows(itertools.chain(*made), {"prompts_shortened": shortened})

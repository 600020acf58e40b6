"""sample: the policy writes G generations for each prompt of a shard, prompt group by group."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from alt_hpc.data import draws
from alt_hpc.engines import Ask, Decoding
from alt_hpc.lm.decode import Generation
from alt_hpc.methods.method import Asking
from alt_hpc.run import rows as rows_of
from alt_hpc.stages.work import Policy, Work

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard: a row per drawn prompt with its raw text, token ids and generations.

    Iteration 1 samples from the plain prompt, later ones ask for the best feedback.
    """
    config, k = work.config, work.piece.iteration
    prompts = dict(zip(work.rows, draws.drawn_prompts(work.run, work.piece), strict=True))
    policy = work.policy(k - 1)
    engine = work.generator(policy, decoding(work, policy))
    how: Asking = "plain" if k == 1 else "best"
    earlier = _earlier(work)
    starts = [*range(work.rows.start, work.rows.stop, engine.together), work.rows.stop]

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        asked: collections.deque[Rows] = collections.deque()

        def entering() -> Iterator[list[Ask]]:
            for group in groups:
                rows: Rows = []
                asks: list[Ask] = []
                for number in range(starts[group], starts[group + 1]):
                    row: dict[str, Any] = {"row": number, "prompt": prompts[number]}
                    feedback = config.method.ask(how, row, earlier)
                    ids, lost = policy.fit(feedback, prompts[number], config.sample.max_new_tokens)
                    rows.append(row | {"lost": lost})
                    asks.append(Ask(ids, row_seed(config.seed, k, number), row))
                asked.append(rows)
                yield asks

        for sampled in engine.sample(entering()):
            yield [
                row | {"generations": [_generation(policy, one) for one in generations]}
                for row, generations in zip(asked.popleft(), sampled, strict=True)
            ]

    rows = work.attempt.resumable(starts, make, "samples", config.sample.generations)
    cut = sum(row["lost"] > 0 for row in rows)
    if cut:
        work.say(f"{cut} of {len(rows)} prompts lost the end of their post (context full)")
    tokens = sum(len(g["ids"]) for row in rows for g in row["generations"])
    work.attempt.commit_rows(rows, {"prompts_cut": cut, "tokens": tokens})


def decoding(work: Work, policy: Policy) -> Decoding:
    """As the config has it."""
    sample = work.config.sample
    return Decoding(
        answers=sample.generations,
        temperature=sample.temperature,
        top_p=sample.top_p,
        max_new_tokens=sample.max_new_tokens,
        group=sample.group,
        silent=work.config.method.silent(policy.tokenizer),
    )


def _earlier(work: Work) -> Rows:
    """What the method reads of the iteration before, to ask with."""
    k = work.piece.iteration
    stages = work.config.method.sources(k)
    return [row for stage in stages for row in rows_of.of_stage(work.run, k - 1, stage)]


def _generation(policy: Policy, one: Generation) -> dict[str, Any]:
    return {"ids": one.ids, "ended": one.ended, "text": policy.text(one.ids)}


def row_seed(seed: int, iteration: int, row: int) -> int:
    """The seed of one drawn prompt: a function of (run seed, iteration, row) alone."""
    state = np.random.SeedSequence([seed, iteration, row]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))

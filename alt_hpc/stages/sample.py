"""sample: the policy writes G generations for each prompt of a shard, prompt group by group."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from alt_hpc import engines
from alt_hpc.data import draws
from alt_hpc.feedback import conditioning
from alt_hpc.generate import Generation
from alt_hpc.stages.work import Policy, Work

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard: a row per drawn prompt with its raw text, token ids and generations.

    Iteration 1 samples from the plain prompt, later ones conditioned on quantile 0.
    """
    config, k = work.config, work.piece.iteration
    sampling, feedback = config.sampling, config.feedback
    prompts = dict(zip(work.rows, draws.drawn_prompts(work.run, work.piece), strict=True))
    policy = work.policy(k - 1)
    engine = engines.load(
        policy.place, sampling, config.policy.dtype, policy.ends, policy.context, work.device
    )
    prefix = "" if k == 1 else conditioning(feedback.template, feedback.texts[0])
    starts = [*range(work.rows.start, work.rows.stop, engine.together), work.rows.stop]

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        asked: collections.deque[Rows] = collections.deque()

        def entering() -> Iterator[engines.Group]:
            for group in groups:
                rows: Rows = []
                prompt_group: engines.Group = []
                for number in range(starts[group], starts[group + 1]):
                    ids, lost = policy.fit(prefix, prompts[number], sampling.max_new_tokens)
                    rows.append({"row": number, "prompt": prompts[number], "lost": lost})
                    prompt_group.append((ids, row_seed(config.seed, k, number)))
                asked.append(rows)
                yield prompt_group

        for sampled in engine.sample(entering()):
            yield [
                row | {"generations": [_generation(policy, one) for one in generations]}
                for row, generations in zip(asked.popleft(), sampled, strict=True)
            ]

    rows = work.attempt.resumable(starts, make, "samples", sampling.generations)
    cut = sum(row["lost"] > 0 for row in rows)
    if cut:
        work.say(f"{cut} of {len(rows)} prompts lost the end of their post (context full)")
    tokens = sum(len(g["ids"]) for row in rows for g in row["generations"])
    work.attempt.commit_rows(rows, {"prompts_cut": cut, "tokens": tokens})


def _generation(policy: Policy, one: Generation) -> dict[str, Any]:
    return {"ids": one.ids, "ended": one.ended, "text": policy.text(one.ids)}


def row_seed(seed: int, iteration: int, row: int) -> int:
    """The seed of one drawn prompt: a function of (run seed, iteration, row) alone."""
    state = np.random.SeedSequence([seed, iteration, row]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))

"""sample: the policy writes G generations for each prompt of a shard, prompt group by group."""

import itertools
from collections.abc import Iterator
from typing import Any

from alt_hpc.data import draws
from alt_hpc.engines import Ask
from alt_hpc.stages.work import Work

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard: a row per drawn prompt with its raw text, token ids and generations.

    Iteration 1 samples from the plain prompt, later ones ask for the best feedback; `feedback` is
    the text that was asked with.
    """
    k, config, method = work.piece.iteration, work.config, work.config.method
    prompts = dict(zip(work.rows, draws.prompts(work.run, work.piece), strict=True))
    policy, s = work.policy(k - 1), config.sample
    engine, size = work.generator(policy), s.group
    decoding = work.decoding(policy, s.generations, size, s.max_new_tokens)
    starts = [*work.rows[:: size if engine.together else 1], work.rows.stop]
    known = work.recall(k - 1)

    def entering(group: int) -> list[Ask]:
        asks = []
        for number in range(starts[group], starts[group + 1]):
            seed, row = work.seed(number), {"row": number, "prompt": prompts[number]}
            feedback = method.ask("plain" if k == 1 else "best", row, known, seed)
            ids, lost = policy.fit(feedback, prompts[number], s.max_new_tokens)
            asks.append(Ask(ids, seed, row | {"lost": lost, "feedback": feedback}))
        return asks

    def make(groups: Iterator[int]) -> Iterator[Rows]:
        asked, again = itertools.tee(map(entering, groups))  # an engine takes some ahead
        for asks, sampled in zip(asked, engine.sample(again, decoding), strict=True):
            made: Rows = []
            for ask, its in zip(asks, sampled, strict=True):
                texts = [{"ids": g.ids, "ended": g.ended, "text": policy.text(g.ids)} for g in its]
                made.append({**ask.row, "generations": texts})
            yield made

    rows = work.attempt.resumable(starts, make, "samples", decoding.answers)
    shortened = sum(row["lost"] > 0 for row in rows)
    if shortened:
        work.say(f"{shortened} of {len(rows)} prompts lost the end of their post (context full)")
    tokens = sum(len(g["ids"]) for row in rows for g in row["generations"])
    work.attempt.commit_rows(rows, {"prompts_shortened": shortened, "tokens": tokens})

"""measure: reward, perplexity and length of the answers of a shard of evaluation."""

import functools
import gc
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

from alt_hpc.graph import OWN
from alt_hpc.lm import load
from alt_hpc.lm.prefix import continuation_logprobs
from alt_hpc.lm.tokens import continuation_ids
from alt_hpc.rewards import Answers
from alt_hpc.stages.work import Work, scorer

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard: a row for each answer of `evaluate`, in its order.

    Perplexity is exp of the mean token loss under the starting policy given the plain prompt, EOS
    excluded; null for an empty answer. Length counts tokens without EOS. The answer of a policy
    with another tokenizer is read with the starting policy's. Two models in turn, never both in
    memory.
    """
    answered = itertools.groupby(work.mates(), operator.itemgetter("row"))
    asked = [list(rows) for _, rows in answered]  # the answers to each prompt
    made: list[Rows] = []
    for number, measure in enumerate((_rewards, _perplexities)):
        make, starts = functools.partial(measure, work, asked), range(len(asked) + 1)
        made.append(work.attempt.resumable(starts, make, "prompts", part=(number, 2)))
        gc.collect()  # the model of this pass
    rows = []
    for answers, *found in zip(asked, *made, strict=True):
        for i, answer in enumerate(answers):
            about = {key: answer[key] for key in ("policy", "set", "row", "variant")}
            rows.append(about | {k: values[i] for one in found for k, values in one.items()})
    work.attempt.commit_rows(rows)


def _rewards(work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    prompts = map(asked.__getitem__, indices)
    texts = (Answers(rows[0]["prompt"], [r["text"] for r in rows], rows[0]) for rows in prompts)
    for scored in scorer(work.run, work.config.measured_by, work.device).score(texts):
        yield [{"reward": [r if math.isfinite(r) else None for r in scored.rewards]}]


def _perplexities(work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    policy = work.policy(0)
    model = load.policy(policy.place, work.config.policy.dtype, work.device)
    for rows in map(asked.__getitem__, indices):
        if rows[0]["policy"] == OWN:  # as the starting policy's token ids, without the ends
            answers = [[i for i in row["ids"] if i not in policy.ends] for row in rows]
        else:
            texts = [f" {row['text']}" if row["text"] else "" for row in rows]
            answers = [continuation_ids(policy.tokenizer, text) for text in texts]
        room = max([work.config.evaluated_tokens, *map(len, answers)])  # of another tokenizer
        ids, _ = policy.fit(None, rows[0]["prompt"], room)
        losses = continuation_logprobs(model, ids, answers)
        found = [math.exp(-sum(one) / len(one)) if one else None for one in losses]
        yield [{"perplexity": found, "length": [len(answer) for answer in answers]}]

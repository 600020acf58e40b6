"""measure: reward, perplexity and length of the answers of a shard of evaluation, and the words.

What a policy's probabilities say of its words is in `report/diagnosis`; here they are taken.
"""

import functools
import gc
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from alt_hpc.data import draws
from alt_hpc.graph import DRAWN, OWN, REFERENCES
from alt_hpc.lm import load
from alt_hpc.lm.reading import Answered, Text, answers_logprobs, logprobs
from alt_hpc.lm.tokens import continuation_ids
from alt_hpc.report.measures import ROUGES
from alt_hpc.rewards import Answers, Reward, Scored
from alt_hpc.run import rows as rows_of
from alt_hpc.stages.work import Work, finite, unload

Rows = list[dict[str, Any]]


def run(work: Work) -> None:
    """Make one shard: a row for each answer of `evaluate`, in its order.

    Perplexity is exp of the mean token loss under the starting policy given the plain prompt, EOS
    excluded; null for an empty answer, and for those that were drawn. Length counts tokens without
    EOS. The answer of a policy with another tokenizer is read with the starting policy's. `word` is
    log p(answer | best feedback) - log p(answer | worst), in nats, under the policy itself, of
    those that were drawn; `fixed`, in a prompt's first row, of the starting policy's. `rouge` are
    the F1 of ROUGE-1, -2 and -L against the label, null without one. Each model in turn, never two
    in memory.
    """
    answered = itertools.groupby(work.mates(), operator.itemgetter("row"))
    asked = [list(rows) for _, rows in answered]  # the answers to each prompt
    made: list[Rows] = []
    further = [functools.partial(_further, name) for name in work.config.measure.further]
    passes: list[Callable[..., Iterator[Rows]]] = [_rewards, *further, _perplexities, _words]
    for number, measure in enumerate(passes):
        make, starts = functools.partial(measure, work, asked), range(len(asked) + 1)
        part = (number, len(passes))
        made.append(work.attempt.resumable(starts, make, "prompts", part=part))
        unload()
        gc.collect()  # the model of this pass
    rows, names = [], [*work.config.measure.further]
    for answers, *found in zip(asked, *made, strict=True):
        for i, answer in enumerate(answers):
            about = {key: answer[key] for key in ("policy", "set", "row", "variant")}
            rows.append(about | {k: values[i] for one in found for k, values in one.items()})
            rows[-1]["further"] = {name: rows[-1].pop(f"further {name}") for name in names}
    work.attempt.commit_rows(rows)


def _scored(
    work: Work, reward: Reward, at: str, asked: list[Rows], indices: Iterator[int]
) -> Iterator[tuple[Answers, Scored]]:
    """What a reward says of the answers to each prompt."""
    data, first = draws.frozen(work.run, work.piece), work.rows.start

    def answers(rows: Rows) -> Answers:
        number, texts = rows[0]["row"], [row["text"] for row in rows]
        return Answers(rows[0]["prompt"], texts, data[number - first], number, rows[0]["set"])

    groups, again = itertools.tee(map(answers, map(asked.__getitem__, indices)))
    return zip(groups, work.scorer(reward, at).score(again), strict=True)


def _further(name: str, work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    """A further reward (`measure.further`), which only measures."""
    at = f"measure.further.{name}"
    for _, scored in _scored(work, work.config.measure.further[name], at, asked, indices):
        yield [{f"further {name}": finite(scored.rewards)}]


def _rewards(work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    """What policies are trained for, and how near they come to the labels."""
    mine, indices = itertools.tee(indices)
    at = "measure.reward" if work.config.measure.reward else "reward"
    scores = _scored(work, work.config.measured_by, at, asked, indices)
    for i, (answers, scored) in zip(mine, scores, strict=True):
        label = answers.row.get("label")
        row: dict[str, Any] = {"reward": finite(scored.rewards)}
        row["rouge"] = [_rouge(answer, label) for answer in asked[i]]
        if parts := {name: finite(part) for name, part in scored.parts.items()}:
            each = zip(*parts.values(), strict=True)
            row["parts"] = [dict(zip(parts, values, strict=True)) for values in each]
        yield [row]


def _rouge(answer: dict[str, Any], label: Any) -> dict[str, float] | None:
    """F1 of ROUGE-1, -2, -L (Lin 2004), words not stemmed; of greedy answers of policies alone."""
    is_drawn = answer["variant"].startswith(DRAWN)
    is_text = isinstance(label, str) and label.strip()
    if answer["policy"] == REFERENCES or is_drawn or not is_text:
        return None
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    found = RougeScorer([*ROUGES], use_stemmer=False).score(label, answer["text"])
    return {name: found[name].fmeasure for name in ROUGES}


def _perplexities(work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    policy = work.policy(0)
    model = load.policy(policy.place, work.config.policy.dtype, work.device)

    def read(rows: Rows) -> tuple[Text, list[int]]:
        """A prompt with the answers to it that count, and the length of each answer."""
        if rows[0]["policy"] == OWN:  # as the starting policy's token ids, without the ends
            answers = [[i for i in row["ids"] if i not in policy.ends] for row in rows]
        else:
            texts = [f" {row['text']}" if row["text"] else "" for row in rows]
            answers = [continuation_ids(policy.tokenizer, text) for text in texts]
        lengths = [len(answer) for answer in answers]
        most = policy.context - 1  # a reference may be longer than what is read of it
        answers = [answer[:most] for answer in answers]
        room = max([work.config.evaluated_tokens, *map(len, answers)])  # of another tokenizer
        ids, _ = policy.fit(None, rows[0]["prompt"], room)
        both = zip(rows, answers, strict=True)
        wanted = [[] if row["variant"].startswith(DRAWN) else answer for row, answer in both]
        return (ids, wanted), lengths

    mine, again = itertools.tee(map(read, map(asked.__getitem__, indices)))
    found = logprobs(model, (text for text, _ in again))
    for losses, (_, lengths) in zip(found, mine, strict=True):
        perplexity = [math.exp(-sum(one) / len(one)) if one else None for one in losses]
        yield [{"perplexity": perplexity, "length": lengths}]


def _words(work: Work, asked: list[Rows], indices: Iterator[int]) -> Iterator[Rows]:
    """Nothing for a policy that is not the run's, knows no words, or was removed since (`keep`)."""
    k, graph, method = work.piece.iteration, work.run.graph(), work.config.method
    fixed: dict[int, list[list[int]]] = {}
    maker, knows = graph.policy(k), {"best", "worst"} <= {*method.asked(k)}
    if knows and (maker is None or not work.run.manifests.wait(maker).removed):
        for piece in graph.fixed(graph.shard(work.piece)):
            for row in rows_of.of_piece(work.run, piece):
                if row["variant"] == f"{DRAWN}plain" and row["row"] in work.rows:
                    fixed.setdefault(row["row"], []).append(row["ids"])
    if not fixed:
        for rows in map(asked.__getitem__, indices):
            yield [dict.fromkeys(("word", "fixed"), [None] * len(rows))]
        return
    policy = work.policy(k)
    model = load.policy(policy.place, work.config.policy.dtype, work.device)

    def own(rows: Rows) -> list[int]:
        return [i for i, row in enumerate(rows) if k and row["variant"].startswith(DRAWN)]

    def read(rows: Rows) -> Answered:
        """A prompt that asks for the best and one for the worst, and the answers that are drawn."""
        answers = [*fixed.get(rows[0]["row"], []), *(rows[i]["ids"] for i in own(rows))]
        if not answers:
            return [], []
        asks = {row["variant"]: row["feedback"] for row in rows}
        new, prompt = work.config.evaluated_tokens, rows[0]["prompt"]
        return [policy.fit(asks[how], prompt, new)[0] for how in ("best", "worst")], answers

    mine, again = itertools.tee(map(asked.__getitem__, indices))
    found = answers_logprobs(model, map(read, again))
    for rows, both in zip(mine, found, strict=True):
        values = [best - worst for best, worst in zip(*both, strict=True)] if both else []
        first = len(fixed.get(rows[0]["row"], []))
        word: list[float | None] = [None] * len(rows)
        for i, value in zip(own(rows), values[first:], strict=True):
            word[i] = value
        yield [{"word": word, "fixed": [values[:first] or None, *[None] * (len(rows) - 1)]}]

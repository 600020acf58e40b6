"""What a model says of texts: hidden states and log-probabilities behind prompts.

On a GPU several prompts are read at once, each a row with what stands behind it side by side:
models would otherwise wait for the launching of their kernels (an H100 read prompts of a 1.2 B
model nine times as fast so, see tests/gpu/results.md). What is found differs from that of one
prompt alone by rounding.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from alt_hpc.lm import tokens
from alt_hpc.lm.memory import READ, SEEN, TOGETHER, WIDE
from alt_hpc.lm.prefix import (
    WORTH,
    Fork,
    batches,
    cache_of,
    is_plain,
    laid,
    padded,
    passing,
    several,
    sight,
)

Text = tuple[list[int], list[list[int]]]  # a prompt, and what stands behind it, one or several
Answered = tuple[list[list[int]], list[list[int]]]  # prompts, and answers behind each of them


def outputs(
    model: PreTrainedModel, prefix: list[int], continuations: list[list[int]], budget: int
) -> Iterator[tuple[int, Tensor]]:
    """The output of a causal language model, or of its trunk, behind one prefix (may be empty).

    Yields which continuation (of at least one token), in an order of our choosing, and at its
    tokens the logits [length, vocabulary], or a trunk's last hidden states [length, hidden].
    Continuations are computed together up to `budget` tokens, those of like length, padded on the
    right, where nothing real can see it.
    """
    order = sorted(range(len(continuations)), key=lambda i: len(continuations[i]))
    kept, device = None, model.device
    if prefix:
        kept = cache_of(model.base_model(input_ids=padded([prefix], device), use_cache=True))
    if prefix and not is_plain(kept):
        for i in order:
            ids = padded([prefix + continuations[i]], device)
            yield i, model(input_ids=ids, use_cache=False)[0][0, len(prefix) :]
        return
    while order:  # by growing length: those that fit together stand first
        most = sum(n * len(continuations[i]) <= budget for n, i in enumerate(order, 1)) or 1
        chosen, order = order[:most], order[most:]
        ids = padded([continuations[i] for i in chosen], device)
        fork = None if kept is None else Cache(layers=[Fork(layer) for layer in kept.layers])
        out = model(input_ids=ids, **passing(model, fork))[0]
        for row, i in enumerate(chosen):
            yield i, out[row, : len(continuations[i])]


def read(trunk: PreTrainedModel, texts: Iterable[Text], budget: int) -> Iterator[list[Tensor]]:
    """Last hidden states [length, hidden] of each continuation of each text.

    `budget`: tokens computed at once behind a prompt, where it is computed by itself.
    """
    for some in batches(texts, functools.partial(_fits, trunk)):
        if _fits(trunk, some):
            yield from _together(trunk, some)
            continue
        prompt, rests = some[0]
        found: list[Tensor] = [torch.empty(0)] * len(rests)
        for i, states in outputs(trunk, prompt, rests, budget):
            found[i] = states
        yield found


def _fits(model: PreTrainedModel, texts: Sequence[Text]) -> bool:
    """Whether texts can be rows of one batch."""
    rows, width = len(texts), max(len(p) + sum(map(len, rests)) for p, rests in texts)
    fits = width <= WIDE and rows * width <= TOGETHER and rows * width**2 <= SEEN
    return fits and several(model)


def _together(trunk: PreTrainedModel, texts: Sequence[Text]) -> Iterator[list[Tensor]]:
    ids, owners, places = (one.to(trunk.device) for one in laid(texts))
    seen = sight(owners, owners, trunk.dtype, causal=True)
    states = trunk(ids, position_ids=places, attention_mask=seen, use_cache=False)[0]
    for row, (prompt, rests) in zip(states, texts, strict=True):
        ends = itertools.accumulate(map(len, rests), initial=len(prompt))
        yield [row[a:b] for a, b in itertools.pairwise(ends)]


def answers_logprobs(
    model: PreTrainedModel, asked: Iterable[Answered]
) -> Iterator[list[list[float]]]:
    """Natural log-probability of each answer behind each of some prompts, [prompts][answers].

    What all prompts begin with is computed once, where it is long.
    """
    asked, again = itertools.tee(asked)
    found = logprobs(model, itertools.chain.from_iterable(itertools.starmap(_apart, again)))
    for prompts, answers in asked:
        texts = _apart(prompts, answers)
        values = itertools.chain(*(next(found) for _ in texts))
        of = answers * len(prompts)
        sums = [sum(one[len(one) - len(a) :]) for one, a in zip(values, of, strict=True)]
        each = len(answers)
        yield [sums[i * each : (i + 1) * each] for i in range(len(prompts))]


def _apart(prompts: list[list[int]], answers: list[list[int]]) -> list[Text]:
    """A text for all prompts, where what they share is long; else one for each."""
    shared = tokens.common(prompts) if prompts else 0
    if shared < WORTH:
        return [(prompt, answers) for prompt in prompts]
    rests = [prompt[shared:] + answer for prompt in prompts for answer in answers]
    return [(prompts[0][:shared], rests)]


@torch.no_grad()
def logprobs(model: PreTrainedModel, texts: Iterable[Text]) -> Iterator[list[list[float]]]:
    """Natural log-probability of each token of each continuation; only these may be empty."""
    trunk: PreTrainedModel = model.base_model  # type: ignore[assignment]
    head = model.get_output_embeddings()
    for some in batches(texts, functools.partial(_fits, model)):
        if not _fits(model, some):
            yield continuation_logprobs(model, *some[0])
            continue
        asked = [_predicting(*text) for text in some]
        states = _together(trunk, [text for text, _ in asked])
        for (_, rests), (_, wanted), found in zip(some, asked, states, strict=True):
            values = iter(_logprobs(head(torch.cat(found)), torch.cat(wanted)) if found else ())
            yield [list(itertools.islice(values, len(rest))) for rest in rests]


def _predicting(prompt: list[int], rests: list[list[int]]) -> tuple[Text, list[Tensor]]:
    """What is read so that each token of the continuations is predicted; those tokens."""
    # The prompt's last token goes with the continuation: it predicts the first one.
    inputs = [prompt[-1:] + rest[:-1] for rest in rests if rest]
    return (prompt[:-1], inputs), [torch.tensor(rest) for rest in rests if rest]


def _logprobs(logits: Tensor, targets: Tensor) -> list[float]:
    found = torch.log_softmax(logits.float(), dim=-1)
    return found.gather(-1, targets.to(found.device)[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def continuation_logprobs(
    model: PreTrainedModel, prompt: list[int], continuations: list[list[int]]
) -> list[list[float]]:
    """As `logprobs`, of one text."""
    found: list[list[float]] = [[] for _ in continuations]
    asked = [i for i, continuation in enumerate(continuations) if continuation]
    (prefix, inputs), targets = _predicting(prompt, continuations)
    for i, logits in outputs(model, prefix, inputs, budget=READ):  # logits are large
        found[asked[i]] = _logprobs(logits, targets[i])
    return found

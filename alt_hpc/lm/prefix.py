"""What a model says behind one prompt that is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from alt_hpc.lm import cache

# Architectures known (and tested) to take 4-D masks and free positions. Others have one prompt
# at a time: GPT-Neo, for one, lays a local mask of its own over whatever it is given.
SIDE_BY_SIDE = frozenset({"gpt2", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3"})


def side_by_side(shape: PretrainedConfig) -> bool:
    """Whether such a model can have several answers to a prompt in one row of a batch."""
    known = shape.model_type in SIDE_BY_SIDE and cache.is_plain_for(shape)
    return known and shape._attn_implementation in ("sdpa", "eager")


def batch(rows: list[list[int]], model: PreTrainedModel) -> Tensor:
    """Rows of token ids as one tensor, padded on the right with 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)


def prefill(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Cache]:
    """Logits of the token after a prompt [1, vocabulary], and the prompt's cache."""
    out = model(input_ids=batch([ids], model), use_cache=True, logits_to_keep=1)
    kept = cache.of(out)
    assert kept is not None  # `check.decodable`
    return out.logits[:, -1], kept


def outputs(
    model: PreTrainedModel, prefix: list[int], continuations: list[list[int]], budget: int
) -> Iterator[tuple[int, Tensor]]:
    """The model's output at each continuation's tokens, the prefix being computed once.

    Continuations are computed together up to `budget` tokens, those of like length, padded on the
    right, where nothing real can see it.

    Parameters
    ----------
    model
        A causal language model, or the trunk of one.
    prefix
        Token ids; may be empty.
    continuations
        Token ids, at least one each.

    Yields
    ------
    index
        Which continuation, in an order of our choosing.
    output
        Logits [length, vocabulary], or of a trunk the last hidden states [length, hidden].
    """
    order = sorted(range(len(continuations)), key=lambda i: len(continuations[i]))
    kept = (
        cache.of(model.base_model(input_ids=batch([prefix], model), use_cache=True))
        if prefix
        else None
    )
    if prefix and not cache.is_plain(kept):
        for i in order:
            out = model(input_ids=batch([prefix + continuations[i]], model), use_cache=False)[0]
            yield i, out[0, len(prefix) :]
        return
    for chosen in _within(budget, order, [len(ids) for ids in continuations]):
        ids = batch([continuations[i] for i in chosen], model)
        fork = None if kept is None else cache.fork(kept)
        out = model(input_ids=ids, **cache.passing(model, fork))[0]
        for row, i in enumerate(chosen):
            yield i, out[row, : len(continuations[i])]


def _within(budget: int, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """`order` (by growing length) in batches whose padded size is within the budget."""
    chosen: list[int] = []
    for i in order:
        if chosen and (len(chosen) + 1) * lengths[i] > budget:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


@torch.no_grad()
def continuation_logprobs(
    model: PreTrainedModel, prompt: list[int], continuations: list[list[int]]
) -> list[list[float]]:
    """Natural log-probability of each continuation's tokens after the prompt (at least 1 token).

    An empty continuation gives an empty list.
    """
    found: list[list[float]] = [[] for _ in continuations]
    asked = [i for i, continuation in enumerate(continuations) if continuation]
    # The prompt's last token goes with the continuation: it predicts the first one.
    inputs = [prompt[-1:] + continuations[i][:-1] for i in asked]
    for i, logits in outputs(model, prompt[:-1], inputs, budget=512):  # logits are large
        targets = torch.tensor(continuations[asked[i]], device=logits.device)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        found[asked[i]] = logprobs.gather(-1, targets[:, None])[:, 0].tolist()
    return found

"""A prompt that is computed once: masks, rows, and all we know of its cache.

The layers of transformers' caches are no public interface: `tests/test_private_names.py` says
which release broke them.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from alt_hpc.lm import tokens
from alt_hpc.lm.memory import TOGETHER

# Architectures known (and tested) to take 4-D masks and free positions. Others have one prompt
# at a time: GPT-Neo, for one, lays a local mask of its own over whatever it is given.
SIDE_BY_SIDE = frozenset({"gpt2", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3"})
WORTH = 64  # tokens that two prompts have in common
NOBODY, ALL = -2, -1  # owners of padding and of the prompt; answers are numbered from 0
_T = TypeVar("_T")
_Both = tuple[Tensor, Tensor]  # keys and values [rows, heads, slots, size]


def passing(model: PreTrainedModel, cache: Cache | None) -> Mapping[str, Any]:
    """The keywords that hand a cache to a model: renamed by transformers 5.24."""
    named = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if named else "past_key_values": cache, "use_cache": cache is not None}


def cache_of(output: Any) -> Cache | None:
    """The cache of a model's output."""
    found: Cache | None = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found


def is_plain(cache: Cache | None) -> bool:
    """Whether it is keys and values of all positions, in every layer."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def strange(cache: Cache | None) -> str | None:
    """What a cache holds that answers to a prompt cannot share, if anything."""
    if type(cache) is not DynamicCache:
        return "no keys and values"
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return f"states ({kinds.pop().__name__})" if kinds else None


class Fork(DynamicLayer):
    """A prompt's layer that any number of rows go on from, once; nothing they add is kept."""

    def __init__(self, prompt: Any) -> None:
        vars(self).update(vars(prompt))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> _Both:
        past: Any = self.keys, self.values
        keys, values = (states.expand(len(key_states), -1, -1, -1) for states in past)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class Slots(DynamicLayer):
    """Prompts' layers, each `rows` times, ends aligned; appending copies only what is appended."""

    def __init__(self, prompts: Sequence[Any], rows: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.length: int = max(layer.get_seq_length() for layer in prompts)
        self.both: list[Tensor] = []  # with room set aside for `room` tokens a row
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in prompts]
            # Zeros, not garbage: 0 x NaN is NaN.
            aligned = [pad(one, (0, 0, self.length - one.shape[2], room)) for one in states]
            self.both.append(torch.cat([one.expand(rows, -1, -1, -1) for one in aligned]))

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> _Both:
        start, self.length = self.length, self.length + key_states.shape[2]
        for states, new in zip(self.both, (key_states, value_states), strict=True):
            states[:, :, start : self.length] = new
        keys, values = (states[:, :, : self.length] for states in self.both)
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.both = [states[indices] for states in self.both]


def side_by_side(shape: PretrainedConfig) -> bool:
    """Whether such a model can have several answers to a prompt in one row of a batch."""
    known = shape.model_type in SIDE_BY_SIDE and is_plain(DynamicCache(config=shape))
    return known and shape._attn_implementation in ("sdpa", "eager")


def sight(owners: Tensor, slots: Tensor, dtype: torch.dtype, *, causal: bool = False) -> Tensor:
    """What each token sees, as scores to add [rows, 1, tokens, slots]: the prompt and its own."""
    # `owners` [rows, tokens] says whose each is, `slots` [rows, slots] whose is what it may see.
    seen = (slots[:, None, :] == owners[:, :, None]) | (slots == ALL)[:, None, :]
    seen = seen.tril() if causal else seen
    scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return scores.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def laid(texts: Sequence[tuple[list[int], list[list[int]]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with what stands behind each, side by side: ids, owners and positions [rows, width].

    Each of a prompt's continuations counts its positions from the prompt's end.
    """
    ids = padded([[*prompt, *itertools.chain(*parts)] for prompt, parts in texts])
    owners, places = torch.full_like(ids, NOBODY), torch.zeros_like(ids)
    for i, (prompt, parts) in enumerate(texts):
        at = start = len(prompt)
        owners[i, :start], places[i, :start] = ALL, torch.arange(start)
        for number, part in enumerate(parts):
            end = at + len(part)
            owners[i, at:end], places[i, at:end] = number, start + torch.arange(end - at)
            at = end
    return ids, owners, places


def padded(rows: Sequence[list[int]], device: torch.device | None = None) -> Tensor:
    """Rows of token ids as one tensor, padded on the right with 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def prefills(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[tuple[Tensor, Cache]]:
    """As `prefill`, of several prompts for a model of `side_by_side`.

    One after the other, each going on from the one before; on a GPU many at once, as it would wait
    for the launching of each one's kernels.
    """
    made: list[tuple[Tensor, Cache]] = []
    if not several(model):
        for i, ids in enumerate(prompts):
            made.append(prefill(model, ids, (prompts[i - 1], made[-1][1]) if made else None))
        return made
    for some in batches(prompts, lambda some: len(some) * max(map(len, some)) <= TOGETHER):
        made += _prefilled(model, some)
    return made


def several(model: PreTrainedModel) -> bool:
    """Whether several prompts are computed at once."""
    return model.device.type == "cuda" and side_by_side(model.config)


def batches(given: Iterable[_T], fits: Callable[[list[_T]], bool]) -> Iterator[list[_T]]:
    """What is computed together, in order: as many as fit, and one that does not by itself."""
    batch: list[_T] = []
    for one in given:
        if batch and not fits([*batch, one]):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _prefilled(
    model: PreTrainedModel, prompts: Sequence[list[int]]
) -> Iterator[tuple[Tensor, Cache]]:
    """Rows of one batch; padding stands on the right, where nothing real can see it."""
    lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
    out = model.base_model(input_ids=padded(prompts, model.device), use_cache=True)
    kept, rows = cache_of(out), torch.arange(len(prompts), device=model.device)
    assert kept is not None  # `side_by_side`
    logits = model.get_output_embeddings()(out[0][rows, lengths - 1])
    layers: Any = kept.layers
    for i, ids in enumerate(prompts):
        past = DynamicCache(config=model.config)
        for number, layer in enumerate(layers):
            keys, values = layer.keys[i : i + 1], layer.values[i : i + 1]
            past.update(keys[:, :, : len(ids)], values[:, :, : len(ids)], number)
        yield logits[i : i + 1], past


def prefill(
    model: PreTrainedModel, ids: list[int], known: tuple[list[int], Cache] | None = None
) -> tuple[Tensor, Cache]:
    """Logits of the token after a prompt [1, vocabulary], and the prompt's cache.

    It goes on from what it has in common with a prompt that is `known`, if that is worth it.
    """
    past, shared = DynamicCache(config=model.config), 0
    if known and is_plain(known[1]) and (common := tokens.common([ids, known[0]])) >= WORTH:
        shared = common
        layers: Any = known[1].layers
        for number, layer in enumerate(layers):
            past.update(layer.keys[:, :, :shared], layer.values[:, :, :shared], number)
    rest = padded([ids[shared:]], model.device)
    out = model(input_ids=rest, logits_to_keep=1, **passing(model, past))
    kept = cache_of(out)
    assert kept is not None  # `check.decodable`
    return out.logits[:, -1], kept

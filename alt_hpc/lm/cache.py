"""Keys and values of a prompt, kept for its answers; all that we know of transformers' caches.

Its layers are no public interface: `tests/test_private_names.py` says which release broke them.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_Both = tuple[Tensor, Tensor]  # keys and values [rows, heads, slots, size]


def passing(model: PreTrainedModel, cache: Cache | None) -> Mapping[str, Any]:
    """The keywords that hand a cache to a model: renamed by transformers 5.24."""
    named = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if named else "past_key_values": cache, "use_cache": cache is not None}


def of(output: Any) -> Cache | None:
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


class _Fork(DynamicLayer):
    """A prompt's layer that many rows go on from at once; nothing they add is kept."""

    def __init__(self, prompt: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = prompt.keys, prompt.values
        self.is_initialized = prompt.is_initialized

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> _Both:
        past: Any = self.keys, self.values
        keys, values = (states.expand(len(key_states), -1, -1, -1) for states in past)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def fork(prompt: Cache) -> Cache:
    """A cache that any number of rows go on from, once."""
    return Cache(layers=[_Fork(layer) for layer in prompt.layers])


class _Slots(DynamicLayer):
    """A layer with room set aside, so that appending copies only what is appended."""

    def __init__(self, prompts: Sequence[Any], rows: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.length: int = max(layer.get_seq_length() for layer in prompts)
        self.all_keys = _aligned([layer.keys for layer in prompts], rows, self.length, room)
        self.all_values = _aligned([layer.values for layer in prompts], rows, self.length, room)

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> _Both:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.all_keys[:, :, start : self.length] = key_states
        self.all_values[:, :, start : self.length] = value_states
        return self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]


def _aligned(states: list[Tensor], rows: int, length: int, room: int) -> Tensor:
    """Zeros (not garbage: 0 x NaN is NaN) with each prompt's states ending at `length`."""
    _, heads, _, size = states[0].shape
    out = states[0].new_zeros(rows * len(states), heads, length + room, size)
    for i, state in enumerate(states):
        out[i * rows : (i + 1) * rows, :, length - state.shape[2] : length] = state
    return out


def slots(prompts: Sequence[Cache], rows: int, room: int) -> Cache:
    """Each prompt's cache `rows` times, their ends aligned, with room for `room` tokens a row."""
    layers = zip(*(cache.layers for cache in prompts), strict=True)
    return Cache(layers=[_Slots(of, rows, room) for of in layers])

"""Sample generations for a prompt group: each prompt computed once, its KV cache shared.

A prompt's generations are decoded *side by side in one sequence*: behind the prompt's keys and
values stand those of its generations, and an attention mask shows each generation the prompt and
its own tokens only. So the prompt is neither computed nor stored once per generation, no step
copies the cache, and a generation that has ended leaves the batch by asking no more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from alt_hpc import attention, models
from alt_hpc.errors import InputError

log = logging.getLogger(__name__)

# Generations in one sequence: more of them share more, and step over more of each other's tokens.
ABREAST = 16
# Architectures known (and tested) to take 4-D masks and free positions. Others decode one prompt
# at a time: GPT-Neo, for one, lays a local mask of its own over whatever it is given.
SIDE_BY_SIDE = frozenset({"gpt2", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3"})

_TOP = 1024  # tokens that nearly always hold the top-p set; sorting a whole vocabulary is slow
_PAD, _PROMPT = -2, -1  # owners of the cache slots that no generation owns


@dataclass(frozen=True)
class Generation:
    """Sampled token ids, the EOS included where it was sampled, and how the generation ended."""

    ids: list[int]
    ended: Literal["eos", "limit"]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    seeds: list[int],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    eos: Collection[int],
    silent: Sequence[int] = (),
) -> list[list[Generation]]:
    """Sample n generations for each prompt of a group.

    Parameters
    ----------
    prompts
        Token ids, at least one each.
    seeds
        One per prompt: its generations draw [n, max_new_tokens] uniforms from it up front, so
        that no prompt depends on its neighbours' randomness.
    temperature
        0 is greedy decoding (then n must be 1).
    top_p
        Tokens come from the smallest set whose probability (softmax of logits / temperature, in
        float32) reaches top_p; of equally probable tokens the smaller id counts first.
    eos, silent
        Token ids that end a generation, and those that are never sampled.

    Returns
    -------
    The n generations of each prompt.

    Raises
    ------
    InputError
        The model's logits are not numbers.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy decoding gives one generation per prompt")
    if not side_by_side(model.config):
        log.warning("%s: prompts are decoded one at a time", model.config.model_type)
        groups: list[slice] = [slice(i, i + 1) for i in range(len(prompts))]
        decoder: type[_Decoder] = _OneByOne
    else:
        groups, decoder = [slice(None)], _SideBySide
    ends, out = frozenset(eos), []
    for group in groups:
        draws = torch.cat([_uniforms(seed, n, max_new_tokens) for seed in seeds[group]])
        sequences = decoder(model, prompts[group], n, max_new_tokens)
        pick = functools.partial(_pick, temperature=temperature, top_p=top_p, silent=list(silent))
        out += _decode(sequences, draws, pick, ends)
    generations = [Generation(ids, "eos" if ids[-1] in ends else "limit") for ids in out]
    return [generations[i : i + n] for i in range(0, len(generations), n)]


class _Decoder(Protocol):
    """A batch of live sequences: n of each prompt, in the prompts' order."""

    first: Tensor  # logits of each one's first token [live, vocabulary]

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int
    ) -> None: ...

    def step(self, keep: list[int], tokens: list[int]) -> Tensor:
        """Keep these live sequences, append a token to each; logits [len(keep), vocabulary]."""
        ...


def _decode(
    sequences: _Decoder,
    draws: Tensor,
    pick: Callable[[Tensor, Tensor], list[int]],
    ends: frozenset[int],
) -> list[list[int]]:
    """Token ids of every sequence; draws [sequences, max_new_tokens]."""
    out: list[list[int]] = [[] for _ in draws]
    live = list(range(len(draws)))
    logits = sequences.first
    for t in range(draws.shape[1]):
        tokens = pick(logits, draws[live, t].to(logits.device))
        for sequence, token in zip(live, tokens, strict=True):
            out[sequence].append(token)
        keep = [i for i, token in enumerate(tokens) if token not in ends]
        live = [live[i] for i in keep]
        if not live or t + 1 == draws.shape[1]:
            break
        logits = sequences.step(keep, [tokens[i] for i in keep])
    return out


# --- choosing a token -------------------------------------------------------------------------


def _uniforms(seed: int, n: int, tokens: int) -> Tensor:
    return torch.rand(n, tokens, generator=torch.Generator().manual_seed(seed))


def _pick(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float, silent: list[int]
) -> list[int]:
    """The next token of each row; logits [rows, vocabulary], uniforms [rows]."""
    logits = logits.float()
    if silent:
        logits = logits.index_fill(-1, torch.tensor(silent, device=logits.device), -torch.inf)
    if bool(logits.isnan().any()):
        raise InputError("the policy's logits are not numbers: its weights or its dtype overflow")
    if temperature == 0:
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
    probabilities = torch.softmax(logits / temperature, dim=-1)
    picked = _pick_of(probabilities, uniforms, top_p, _TOP)
    tokens = picked.tolist()
    return tokens


def _pick_of(probabilities: Tensor, uniforms: Tensor, top_p: float, top: int) -> Tensor:
    """Inverse-CDF sampling of the top-p set, looked for among the `top` most probable tokens."""
    values, ids = _ranked(probabilities, top)
    mass = values.cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=ids.shape[-1] - 1)  # of the set
    target = uniforms[:, None] * mass.gather(-1, last)
    index = torch.searchsorted(mass, target, right=True)
    tokens = ids.gather(-1, torch.minimum(index, last))[:, 0]
    if top >= probabilities.shape[-1]:
        return tokens
    # A set that reaches the least value looked at may go on beyond it.
    short = (values.gather(-1, last) <= values[:, -1:]).nonzero()[:, 0]
    if len(short):
        tokens[short] = _pick_of(
            probabilities[short], uniforms[short], top_p, probabilities.shape[-1]
        )
    return tokens


def _ranked(probabilities: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` largest values of each row and their ids, in order; ties by id."""
    if top >= probabilities.shape[-1]:
        values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = probabilities.topk(top, dim=-1).indices.sort(dim=-1).values
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


# --- decoding a batch -------------------------------------------------------------------------


def side_by_side(config: PretrainedConfig) -> bool:
    """Whether such a model can have several answers to a prompt in one row of a batch."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    known = config.model_type in SIDE_BY_SIDE
    return plain and known and config._attn_implementation in ("sdpa", "eager")


def check(place: Path) -> None:
    """Raise InputError where a folder's model keeps what we cannot share between answers.

    Asked of a model without memory. Mamba, LFM2 and others keep states of another kind than keys
    and values; what cannot even be tried so is refused too.
    """
    model = models.empty(models.load_config(place), AutoModelForCausalLM)
    name = type(model).__name__
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
            cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    except Exception as error:  # whatever an architecture of its own kind raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: cannot be tried before it is used ({reason})") from error
    if type(cache) is not DynamicCache:
        raise InputError(f"{name}: keeps no keys and values that answers could share")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__
            raise InputError(f"{name}: keeps states ({kind}) that answers cannot share")


def _prefill(model: PreTrainedModel, ids: list[int], plain: bool) -> tuple[Tensor, Cache]:
    """Logits of the token after a prompt [1, vocabulary], and the prompt's cache."""
    with attention.products(model, plain):
        out = model(input_ids=_batch([ids], model), use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def _batch(rows: list[list[int]], model: PreTrainedModel) -> Tensor:
    """Rows of token ids as one tensor, padded on the right with 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)


class _Slots(DynamicLayer):
    """A cache layer with room set aside, so that appending copies only what is appended."""

    def __init__(self, prompts: list[Any], rows: list[int], room: int) -> None:
        """Repeat each prompt's layer [1, heads, length, size] rows times, ends aligned."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.length: int = max(layer.get_seq_length() for layer in prompts)
        self.all_keys = _aligned([layer.keys for layer in prompts], rows, self.length, room)
        self.all_values = _aligned([layer.values for layer in prompts], rows, self.length, room)

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.all_keys[:, :, start : self.length] = key_states
        self.all_values[:, :, start : self.length] = value_states
        return self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]


def _aligned(states: list[Tensor], rows: list[int], length: int, room: int) -> Tensor:
    """Zeros (not garbage: 0 x NaN is NaN) with each prompt's states ending at `length`."""
    _, heads, _, size = states[0].shape
    out = states[0].new_zeros(sum(rows), heads, length + room, size)
    start = 0
    for state, count in zip(states, rows, strict=True):
        out[start : start + count, :, length - state.shape[2] : length] = state
        start += count
    return out


class _SideBySide:
    """Up to ABREAST generations of a prompt share one row of the batch: see the module's text.

    Attributes
    ----------
    places
        Row of each live sequence, and its number among the generations of its row.
    owners
        Whose token each cache slot of a row holds [rows, slots].
    positions
        Next position in each row [rows]: the same for all of a row's generations.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int) -> None:
        self.model = model
        logits, caches = zip(*(_prefill(model, ids, True) for ids in prompts), strict=True)
        self.first = torch.cat(logits).repeat_interleave(n, dim=0)
        per_prompt = -(-n // ABREAST)
        abreast = -(-n // per_prompt)
        rows = [per_prompt] * len(prompts)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        self.layers = [_Slots(list(of), rows, room * abreast) for of in layers]
        self.cache = Cache(layers=[*self.layers])
        self.places = [
            (p * per_prompt + g // abreast, g % abreast)
            for p in range(len(prompts))
            for g in range(n)
        ]
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        self.positions = lengths.repeat_interleave(per_prompt)
        slots = torch.arange(int(lengths.max()), device=model.device)
        padding = slots < slots.shape[0] - self.positions[:, None]
        self.owners = torch.where(padding, _PAD, _PROMPT)

    def step(self, keep: list[int], tokens: list[int]) -> Tensor:
        self.places = [self.places[i] for i in keep]
        self._drop_rows()
        rows, columns = self._columns()
        shape = (len(self.positions), max(columns) + 1)
        ids = self.positions.new_zeros(shape)
        owners = self.positions.new_full(shape, _PAD)
        ids[rows, columns] = torch.tensor(tokens, device=ids.device)
        owners[rows, columns] = torch.tensor([g for _, g in self.places], device=ids.device)
        self.owners = torch.cat([self.owners, owners], dim=1)
        with attention.products(self.model, plain=True):
            logits = self.model(
                input_ids=ids,
                position_ids=self.positions[:, None].expand(shape),
                attention_mask=self._mask(owners),
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        self.positions = self.positions + 1
        chosen: Tensor = logits[rows, columns]
        return chosen

    def _columns(self) -> tuple[list[int], list[int]]:
        """Where in the batch [rows, columns] each live sequence asks: no gaps in a row."""
        used: dict[int, int] = {}
        columns = []
        for row, _ in self.places:
            columns.append(used.get(row, 0))
            used[row] = columns[-1] + 1
        return [row for row, _ in self.places], columns

    def _mask(self, owners: Tensor) -> Tensor:
        """What each asking column may see, as scores to add [rows, 1, columns, slots]."""
        own = self.owners[:, None, :] == owners[:, :, None]
        seen = own | (self.owners == _PROMPT)[:, None, :]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]

    def _drop_rows(self) -> None:
        """Leave rows without live sequences out, once they are a quarter: it copies the cache."""
        rows = sorted({row for row, _ in self.places})
        if 4 * len(rows) > 3 * len(self.positions):
            return
        index = torch.tensor(rows, device=self.positions.device)
        self.positions, self.owners = self.positions[index], self.owners[index]
        for layer in self.layers:
            layer.batch_select_indices(index)
        number = {row: i for i, row in enumerate(rows)}
        self.places = [(number[row], g) for row, g in self.places]


class _OneByOne:
    """The n generations of one prompt, as any architecture with a cache can decode them."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int) -> None:
        (prompt,) = prompts
        self.model, self.live = model, n
        logits, self.cache = _prefill(model, prompt, False)
        self.first = logits.repeat_interleave(n, dim=0)
        self.cache.batch_repeat_interleave(n)

    def step(self, keep: list[int], tokens: list[int]) -> Tensor:
        if len(keep) < self.live:
            self.live = len(keep)
            self.cache.batch_select_indices(torch.tensor(keep, device=self.model.device))
        ids = _batch([[token] for token in tokens], self.model)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits


# --- reading given continuations --------------------------------------------------------------


class _Fork(DynamicLayer):
    """A prefix's layer that many continuations read at once; nothing they add is kept."""

    def __init__(self, prefix: Any, apart: bool) -> None:
        """apart: whether attention takes the prefix and what follows it as they are."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.prefix, self.apart = prefix, apart

    def get_seq_length(self) -> int:
        length: int = self.prefix.get_seq_length()
        return length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        keys, values = self.prefix.keys, self.prefix.values
        if self.apart:
            return attention.Forked(keys, key_states), attention.Forked(values, value_states)
        rows = len(key_states)
        keys, values = (states.expand(rows, -1, -1, -1) for states in (keys, values))
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def read(
    model: PreTrainedModel, prefix: list[int], continuations: list[list[int]], budget: int
) -> Iterator[tuple[int, Tensor]]:
    """The model's output at each continuation's tokens, the prefix being computed once.

    Continuations are read together up to `budget` tokens, those of like length, padded on the
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
    plain = side_by_side(model.config)
    layers = _prefix_layers(model, prefix, plain)
    if prefix and layers is None:
        for i in order:
            out = model(input_ids=_batch([prefix + continuations[i]], model), use_cache=False)[0]
            yield i, out[0, len(prefix) :]
        return
    for chosen in _within(budget, order, [len(ids) for ids in continuations]):
        ids = _batch([continuations[i] for i in chosen], model)
        if layers is None:
            out = model(input_ids=ids, use_cache=False)[0]
        else:
            with attention.products(model, plain) as apart:
                cache = Cache(layers=[_Fork(layer, apart) for layer in layers])
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)[0]
        for row, i in enumerate(chosen):
            yield i, out[row, : len(continuations[i])]


def _within(budget: int, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Cut `order` (by growing length) into batches whose padded size is within the budget."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _prefix_layers(model: PreTrainedModel, prefix: list[int], plain: bool) -> list[Any] | None:
    """Each layer's keys and values of the prefix; None where it is empty or there can be none."""
    if not prefix:
        return None
    with attention.products(model, plain):
        out = model.base_model(input_ids=_batch([prefix], model), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return list(cache.layers)


@torch.no_grad()
def continuation_logprobs(
    model: PreTrainedModel, prompt: list[int], continuations: list[list[int]]
) -> list[list[float]]:
    """Natural log-probability of each continuation's tokens after the prompt (at least 1 token).

    An empty continuation gives an empty list.
    """
    out: list[list[float]] = [[] for _ in continuations]
    asked = [i for i, continuation in enumerate(continuations) if continuation]
    # The prompt's last token is read with the continuation: it predicts the first one.
    inputs = [prompt[-1:] + continuations[i][:-1] for i in asked]
    for i, logits in read(model, prompt[:-1], inputs, budget=512):  # logits are large
        targets = torch.tensor(continuations[asked[i]], device=logits.device)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        out[asked[i]] = logprobs.gather(-1, targets[:, None])[:, 0].tolist()
    return out

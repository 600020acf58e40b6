"""Sample generations for a prompt group: each prompt computed once, its KV cache shared.

A prompt's generations are decoded *side by side in one sequence*: behind the prompt's keys and
values stand those of its generations, and an attention mask shows each generation the prompt and
its own tokens only. So the prompt is neither computed nor stored once per generation, no step
copies the cache, and a generation that has ended leaves the batch by asking no more.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alt_hpc.errors import InputError
from alt_hpc.lm import cache
from alt_hpc.lm.prefix import ALL, NOBODY, padded, prefill, side_by_side, sight

log = logging.getLogger(__name__)

# Generations in one sequence: more of them share more, and step over more of each other's tokens.
ABREAST = 16
_TOP = 1024  # tokens that nearly always hold the top-p set; sorting a whole vocabulary is slow


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
    """Sample n generations for each prompt (at least one token id) of a group.

    A prompt's generations draw [n, max_new_tokens] uniforms from its seed up front, so that no
    prompt depends on its neighbours' randomness. Temperature 0 is greedy decoding (then n must be
    1). Tokens come from the smallest set whose probability (softmax of logits / temperature, in
    float32) reaches top_p; of equally probable tokens the smaller id counts first. `eos` are token
    ids that end a generation, `silent` those that are never sampled. InputError where the model's
    logits are not numbers.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy decoding gives one generation per prompt")
    groups: list[slice] = [slice(None)]
    decoder: "type[_SideBySide | _OneByOne]" = _SideBySide
    if not side_by_side(model.config):
        log.warning("%s: prompts are decoded one at a time", model.config.model_type)
        groups, decoder = [slice(i, i + 1) for i in range(len(prompts))], _OneByOne
    ends, out = frozenset(eos), []
    pick = functools.partial(_pick, temperature=temperature, top_p=top_p, silent=list(silent))
    for group in groups:
        draws = torch.cat([_uniforms(seed, n, max_new_tokens) for seed in seeds[group]])
        out += _decode(decoder(model, prompts[group], n, max_new_tokens), draws, pick, ends)
    generations = [Generation(ids, "eos" if ids[-1] in ends else "limit") for ids in out]
    return [generations[i : i + n] for i in range(0, len(generations), n)]


def _decode(
    sequences: "_SideBySide | _OneByOne",
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
        logits = sequences.append(keep, [tokens[i] for i in keep])
    return out


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
        picked = logits.argmax(-1)
    else:
        picked = _draw(torch.softmax(logits / temperature, dim=-1), uniforms, top_p, _TOP)
    tokens: list[int] = picked.tolist()
    return tokens


def _draw(probabilities: Tensor, uniforms: Tensor, top_p: float, top: int) -> Tensor:
    """Inverse-CDF sampling of the top-p set, looked for among the `top` most probable tokens."""
    values, ids = _largest(probabilities, top)
    mass = values.cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=ids.shape[-1] - 1)  # of the set
    target = uniforms[:, None] * mass.gather(-1, last)
    index = torch.searchsorted(mass, target, right=True)
    tokens = ids.gather(-1, torch.minimum(index, last))[:, 0]
    size = probabilities.shape[-1]
    if top < size:  # a set that reaches the least value looked at may go on beyond it
        short = (values.gather(-1, last) <= values[:, -1:]).nonzero()[:, 0]
        if len(short):
            tokens[short] = _draw(probabilities[short], uniforms[short], top_p, size)
    return tokens


def _largest(probabilities: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` largest values of each row and their ids, in order; ties by id."""
    if top >= probabilities.shape[-1]:
        values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = probabilities.topk(top, dim=-1).indices.sort(dim=-1).values
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


class _SideBySide:
    """Live sequences, n of each prompt, in order; up to ABREAST of a prompt share one row."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int) -> None:
        self.model = model
        logits, caches = zip(*(prefill(model, ids) for ids in prompts), strict=True)
        self.first = torch.cat(logits).repeat_interleave(n, dim=0)  # [live, vocabulary]
        rows = -(-n // ABREAST)  # of a prompt
        abreast = -(-n // rows)
        self.cache = cache.slots(caches, rows, room * abreast)
        numbers = [(p, g) for p in range(len(prompts)) for g in range(n)]
        # Row of each live sequence, and its number among the generations of its row.
        self.places = [(p * rows + g // abreast, g % abreast) for p, g in numbers]
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        # Next position in each row [rows]: the same for all of a row's generations.
        self.positions = lengths.repeat_interleave(rows)
        slots = torch.arange(int(lengths.max()), device=model.device)
        padding = slots < slots.shape[0] - self.positions[:, None]
        self.owners = torch.where(padding, NOBODY, ALL)  # of each cache slot [rows, slots]

    def append(self, keep: list[int], tokens: list[int]) -> Tensor:
        """Keep these live sequences, append a token to each; logits [len(keep), vocabulary]."""
        self.places = [self.places[i] for i in keep]
        self._drop_rows()
        rows, numbers = map(list, zip(*self.places, strict=True))
        # A row's live sequences ask in its first columns: no gaps.
        columns = [i for _, row in itertools.groupby(rows) for i, _ in enumerate(row)]
        shape = (len(self.positions), max(columns) + 1)
        ids = self.positions.new_zeros(shape)
        owners = self.positions.new_full(shape, NOBODY)
        ids[rows, columns] = torch.tensor(tokens, device=ids.device)
        owners[rows, columns] = torch.tensor(numbers, device=ids.device)
        self.owners = torch.cat([self.owners, owners], dim=1)
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=self.positions[:, None].expand(shape),
            attention_mask=sight(owners, self.owners, self.model.dtype),
            **cache.passing(self.model, self.cache),
        ).logits
        self.positions = self.positions + 1
        return logits[rows, columns]

    def _drop_rows(self) -> None:
        """Leave rows without live sequences out, once they are a quarter: it copies the cache."""
        rows = sorted({row for row, _ in self.places})
        if 4 * len(rows) > 3 * len(self.positions):
            return
        index = torch.tensor(rows, device=self.positions.device)
        self.positions, self.owners = self.positions[index], self.owners[index]
        self.cache.batch_select_indices(index)
        number = {row: i for i, row in enumerate(rows)}
        self.places = [(number[row], g) for row, g in self.places]


class _OneByOne:
    """As `_SideBySide`, of one prompt: any architecture with a cache can decode it so."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int) -> None:
        (prompt,) = prompts
        self.model, self.live = model, n
        logits, self.cache = prefill(model, prompt)
        self.first = logits.repeat_interleave(n, dim=0)
        self.cache.batch_repeat_interleave(n)

    def append(self, keep: list[int], tokens: list[int]) -> Tensor:
        if len(keep) < self.live:
            self.live = len(keep)
            self.cache.batch_select_indices(torch.tensor(keep, device=self.model.device))
        ids = padded([[token] for token in tokens], self.model.device)
        logits: Tensor = self.model(input_ids=ids, **cache.passing(self.model, self.cache)).logits
        return logits[:, -1]

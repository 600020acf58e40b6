"""Sample generations for a prompt group: each prompt computed once, its KV cache shared.

Of a prompt that begins like the one before it in the group only the rest is computed.

A prompt's generations are decoded *side by side in one sequence*: behind the prompt's keys and
values stand those of its generations, and an attention mask shows each generation the prompt and
its own tokens only. So the prompt is neither computed nor stored once per generation, no step
copies the cache, and a generation that has ended leaves the batch by asking no more.
"""

import itertools
import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from alt_hpc.errors import InputError
from alt_hpc.lm.memory import ABREAST
from alt_hpc.lm.prefix import (
    ALL,
    NOBODY,
    Slots,
    padded,
    passing,
    prefill,
    prefills,
    side_by_side,
    sight,
)
from alt_hpc.lm.tokens import Generation

# Tokens among which the top-p set is looked for first, and how many times as many then: sorting is
# slow, a whole vocabulary's above all.
_TOP, _MORE = 128, 16


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    seeds: list[int],
    *,
    temperature: float,  # 0 is greedy decoding: then n must be 1
    top_p: float,
    max_new_tokens: int,
    eos: Collection[int],  # token ids that end a generation
    silent: Sequence[int] = (),  # those that are never sampled
) -> list[list[Generation]]:
    """Sample n generations for each prompt (at least one token id) of a group.

    A prompt's generations draw [n, max_new_tokens] uniforms from its seed up front, so that no
    prompt depends on its neighbours' randomness. Tokens come from the smallest set whose
    probability (softmax of logits / temperature, in float32) reaches top_p; of equally probable
    tokens the smaller id counts first. InputError where the model's logits are not numbers.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy decoding gives one generation per prompt")
    groups: list[slice] = [slice(None)]
    decoder: type[_SideBySide | _OneByOne] = _SideBySide
    if not side_by_side(model.config):
        told = "%s: prompts are decoded one at a time"
        logging.getLogger(__name__).warning(told, model.config.model_type)
        groups, decoder = [slice(i, i + 1) for i in range(len(prompts))], _OneByOne
    ends, made = frozenset(eos), []
    for group in groups:
        sources = [torch.Generator().manual_seed(seed) for seed in seeds[group]]
        draws = torch.cat([torch.rand(n, max_new_tokens, generator=one) for one in sources])
        sequences = decoder(model, prompts[group], n, max_new_tokens)
        out: list[list[int]] = [[] for _ in draws]
        live, logits = list(range(len(draws))), sequences.first
        for t in range(max_new_tokens):
            uniforms = draws[live, t].to(logits.device)
            tokens = _pick(logits, uniforms, temperature, top_p, silent)
            for sequence, token in zip(live, tokens, strict=True):
                out[sequence].append(token)
            keep = [i for i, token in enumerate(tokens) if token not in ends]
            live = [live[i] for i in keep]
            if not live or t + 1 == max_new_tokens:
                break
            logits = sequences.append(keep, [tokens[i] for i in keep])
        made += [Generation(ids, "eos" if ids[-1] in ends else "limit") for ids in out]
    return [made[i : i + n] for i in range(0, len(made), n)]


def _pick(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, silent: Sequence[int]
) -> list[int]:
    """The next token of each row; logits [rows, vocabulary], uniforms [rows]."""
    logits = logits.float()
    if silent:
        logits = logits.index_fill(-1, torch.tensor(silent, device=logits.device), -torch.inf)
    if bool(logits.isnan().any()):
        raise InputError("the policy's logits are not numbers: its weights or its dtype overflow")
    if temperature == 0:
        return logits.argmax(-1).tolist()
    return _draw(torch.softmax(logits / temperature, dim=-1), uniforms, top_p, _TOP).tolist()


def _draw(probabilities: Tensor, uniforms: Tensor, top_p: float, top: int) -> Tensor:
    """Inverse-CDF sampling of the top-p set, looked for among the `top` most probable tokens."""
    size = probabilities.shape[-1]
    ids = torch.arange(size, device=probabilities.device).expand_as(probabilities)
    if top < size:
        ids = probabilities.topk(top, dim=-1).indices.sort(dim=-1).values
    # Stable: of equal values the smaller id stays first.
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    mass = values.cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=ids.shape[-1] - 1)  # of the set
    target = uniforms[:, None] * mass.gather(-1, last)
    index = torch.searchsorted(mass, target, right=True)
    tokens = ids.gather(-1, order.gather(-1, torch.minimum(index, last)))[:, 0]
    if top < size:  # a set that reaches the least value looked at may go on beyond it
        short = (values.gather(-1, last) <= values[:, -1:]).nonzero()[:, 0]
        if len(short):
            tokens[short] = _draw(probabilities[short], uniforms[short], top_p, _MORE * top)
    return tokens


class _SideBySide:
    """Live sequences, n of each prompt, in order; up to ABREAST of a prompt share one row."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], n: int, room: int) -> None:
        self.model = model
        logits, caches = zip(*prefills(model, prompts), strict=True)
        self.first = torch.cat(logits).repeat_interleave(n, dim=0)  # [live, vocabulary]
        rows = -(-n // ABREAST)  # of a prompt
        abreast = -(-n // rows)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        self.cache = Cache(layers=[Slots(layer, rows, room * abreast) for layer in layers])
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
        left = {row: i for i, row in enumerate(sorted({row for row, _ in self.places}))}
        # Rows without live sequences are left out once they are a quarter: it copies the cache.
        if 4 * len(left) <= 3 * len(self.positions):
            index = torch.tensor(list(left), device=self.positions.device)
            self.positions, self.owners = self.positions[index], self.owners[index]
            self.cache.batch_select_indices(index)
            self.places = [(left[row], g) for row, g in self.places]
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
            **passing(self.model, self.cache),
        ).logits
        self.positions = self.positions + 1
        return logits[rows, columns]


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
        logits: Tensor = self.model(input_ids=ids, **passing(self.model, self.cache)).logits
        return logits[:, -1]

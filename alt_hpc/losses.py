"""What a training minimises: examples, their batches, and losses summed over what they teach.

A loss takes (model, batch) and returns its *sum* over the batch's loss tokens (or pairs), with
its parts as detached sums; the trainer divides by their number in the whole optimiser step. A
model's head is always called as a module, never through its weight: under ZeRO-3 the weight is
there only while its module runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alt_hpc.errors import InputError

CHUNK = 512  # positions whose logits [CHUNK, vocabulary] are alive at once

Parts = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], tuple[Tensor, Parts]]
B = TypeVar("B")


class Trainable(Protocol):
    """What the trainer asks of an example."""

    @property
    def weight(self) -> int:
        """Loss tokens (pairs count 1): an example's share in the normaliser of the loss."""

    @property
    def tokens(self) -> int:
        """All tokens that are computed."""

    def empty(self) -> Trainable:
        """The cheapest example of the same kind that teaches nothing."""

    @classmethod
    def batch(cls, rows: Sequence[Any], most: int) -> Any:
        """Collate `rows`; `most` is the largest weight that any rank collates at this moment."""


@dataclass(frozen=True)
class Example:
    """A conditioned prompt and what was written after it: tokens from `start` on are learned.

    `plain` is the prompt as the reference reads it; None: the same.
    """

    ids: list[int]
    start: int
    plain: list[int] | None = None

    @property
    def weight(self) -> int:
        return len(self.ids) - self.start

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def empty(self) -> Example:
        return Example(self.ids[:1], 1, self.plain and self.plain[:1])

    def plainly(self) -> Example:
        """As the reference reads it."""
        plain = self.plain or []
        return Example([*plain, *self.ids[self.start :]], len(plain))

    @classmethod
    def batch(cls, rows: Sequence[Example], most: int) -> TextBatch:
        """Pad on the right; point at the positions that predict a loss token."""
        ids, mask = _pad([row.ids for row in rows])
        width = ids.shape[1]
        positions = [
            index * width + at - 1
            for index, row in enumerate(rows)
            for at in range(row.start, len(row.ids))
        ]
        targets = [token for row in rows for token in row.ids[row.start :]]
        chunks = max(1, -(-most // CHUNK))
        other = None
        if rows[0].plain is not None:
            other = Example.batch([row.plainly() for row in rows], most)
        return TextBatch(ids, mask, _longs(positions), _longs(targets), chunks, reference=other)


@dataclass(frozen=True)
class Siblings:
    """A conditioned prompt and several answers to it, the prompt computed once for all.

    They stand behind one another in one row; each sees the prompt and itself, and counts its
    positions from the prompt's end. `together` is False for models that cannot take such a row
    (see `generate.side_by_side`): then each answer has the prompt to itself.
    """

    prompt: list[int]
    answers: list[list[int]]
    together: bool = True
    plain: list[int] | None = None  # the prompt as the reference reads it; None: the same

    @property
    def weight(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.weight

    def empty(self) -> Siblings:
        return Siblings(self.prompt[:1], [], self.together, self.plain and self.plain[:1])

    def alone(self) -> list[Example]:
        """Each answer with the prompt to itself."""
        start = len(self.prompt)
        return [Example([*self.prompt, *a], start, self.plain) for a in self.answers]

    @classmethod
    def batch(cls, rows: Sequence[Siblings], most: int) -> TextBatch:
        if not rows[0].together:
            alone = [example for row in rows for example in row.alone()]
            return Example.batch(alone or [Example(rows[0].prompt, 1, rows[0].plain)], most)
        ids, mask = _pad([[*row.prompt, *(t for a in row.answers for t in a)] for row in rows])
        width = ids.shape[1]
        owners, places = torch.full_like(ids, _NOBODY), torch.zeros_like(ids)
        positions, targets = [], []
        for index, row in enumerate(rows):
            at = start = len(row.prompt)
            owners[index, :start] = _ALL
            places[index, :start] = torch.arange(start)
            for number, answer in enumerate(row.answers):
                end = at + len(answer)
                owners[index, at:end] = number
                places[index, at:end] = torch.arange(start, start + len(answer))
                before = [start - 1, *range(at, end - 1)]
                positions += [index * width + place for place in before]
                targets += answer
                at = end
        chunks = max(1, -(-most // CHUNK))
        other = None
        if rows[0].plain is not None:
            other = cls.batch([Siblings(row.plain or [], row.answers) for row in rows], most)
        return TextBatch(
            ids, mask, _longs(positions), _longs(targets), chunks, owners, places, other
        )


_NOBODY, _ALL = -2, -1  # owners of padding and of the prompt


@dataclass(frozen=True)
class TextBatch:
    """Sequences with the positions that predict a loss token.

    `chunks` is the same on every rank, however many loss tokens each has: under ZeRO-3 each call
    of the head is a collective. `owners` and `places` are there for siblings only.
    """

    ids: Tensor  # [rows, width], padded on the right
    mask: Tensor  # [rows, width], 1 where there is a token
    positions: Tensor  # [n], into the flattened [rows * width]
    targets: Tensor  # [n], the token after each position
    chunks: int
    owners: Tensor | None = None  # [rows, width]: which answer a token is of
    places: Tensor | None = None  # [rows, width]: its position for the model
    reference: TextBatch | None = None  # the same answers behind what the reference reads


@dataclass(frozen=True)
class Pair:
    """A comparison: `chosen` was preferred to `rejected` (token ids of whole texts)."""

    chosen: list[int]
    rejected: list[int]
    weight: int = 1

    @property
    def tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def empty(self) -> Pair:
        return Pair(self.chosen[:1], self.rejected[:1], 0)

    @classmethod
    def batch(cls, rows: Sequence[Pair], most: int) -> PairBatch:
        texts = [row.chosen for row in rows] + [row.rejected for row in rows]
        ids, mask = _pad(texts)
        last = [index * ids.shape[1] + len(text) - 1 for index, text in enumerate(texts)]
        return PairBatch(ids, mask, _longs(last), _floats([row.weight for row in rows]))


@dataclass(frozen=True)
class PairBatch:
    """All chosen texts, then all rejected ones."""

    ids: Tensor  # [2 * pairs, width], padded on the right
    mask: Tensor  # [2 * pairs, width]
    last: Tensor  # [2 * pairs], of each text's last token, into the flattened ids
    weights: Tensor  # [pairs], 0 for a pair that teaches nothing


@dataclass(frozen=True, eq=False)
class FeaturePair:
    """A comparison as the frozen trunk's features, [2, hidden]: chosen, then rejected."""

    features: Tensor
    weight: int = 1
    tokens: int = 0

    def empty(self) -> FeaturePair:
        return FeaturePair(self.features, 0)

    @classmethod
    def batch(cls, rows: Sequence[FeaturePair], most: int) -> FeatureBatch:
        features = torch.stack([row.features for row in rows])
        return FeatureBatch(features, _floats([row.weight for row in rows]))


@dataclass(frozen=True)
class FeatureBatch:
    features: Tensor  # [pairs, 2, hidden]
    weights: Tensor  # [pairs]


def move(batch: B, device: torch.device) -> B:
    """The same batch with its tensors on `device`."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}  # type: ignore[arg-type]
    moved: dict[str, Any] = {
        key: v.to(device) for key, v in fields.items() if isinstance(v, Tensor)
    }
    moved |= {key: move(v, device) for key, v in fields.items() if isinstance(v, TextBatch)}
    return dataclasses.replace(batch, **moved)  # type: ignore[type-var]


class ForLoss(nn.Module):
    """A model whose forward pass is its loss: what DeepSpeed's engine wraps and calls."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, Parts]:
        return self.loss(self.module, batch)


def alt_loss(
    model: nn.Module,
    batch: TextBatch,
    *,
    entropy: float = 0.06,
    kl: float = 0.0,
    reference: nn.Module | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Parts]:
    """Sum over loss tokens of CE - entropy * H + kl * KL(reference || policy).

    H is the entropy of the policy's next-token distribution, KL is over the full vocabulary at
    temperature 1, with the same input to both (arXiv 2407.16970, section 3). Bind the
    coefficients with `functools.partial`.

    Quark's reference reads another prompt (`TextBatch.reference`), and knows but the first
    `vocabulary` token ids: KL is then over these alone, CE and H over all.

    Parameters
    ----------
    model
        A causal language model of transformers.
    reference
        The same kind, in eval mode and on the batch's device; it gets no gradient. Needed where
        `kl` is not 0.

    Returns
    -------
    The sum (float32 scalar) and the detached sums "ce", "entropy" and, with a reference, "kl".

    Raises
    ------
    InputError
        `kl` without a reference, or a model that changes its logits after the head.
    """
    if kl and reference is None:
        raise InputError("the KL term of the loss needs a reference model")
    hidden = _text_hidden(model, batch)
    reference_hidden = hidden.new_empty(len(hidden), 0)
    if reference is not None:
        with torch.no_grad():
            reference_hidden = _text_hidden(reference, batch.reference or batch)
    head = _head(model)
    reference_head = _head(reference) if reference is not None else None
    totals = hidden.new_zeros(3, dtype=torch.float32)
    pieces = (t.tensor_split(batch.chunks) for t in (hidden, batch.targets, reference_hidden))
    for piece in zip(*pieces, strict=True):
        # The logits are computed again in the backward pass, so that those of one chunk are
        # alive at a time. Nothing in there is random.
        totals = totals + checkpoint(
            _chunk,
            head,
            reference_head,
            vocabulary,
            *piece,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    loss = totals[0] - entropy * totals[1] + kl * totals[2]
    names = ("ce", "entropy") if reference is None else ("ce", "entropy", "kl")
    return loss, dict(zip(names, totals.detach(), strict=False))


def sft_loss(model: nn.Module, batch: TextBatch) -> tuple[Tensor, Parts]:
    """Sum over loss tokens of the cross-entropy; the entropy is only reported."""
    return alt_loss(model, batch, entropy=0.0)


def pair_loss(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Parts]:
    """Sum over pairs of -log sigmoid(r_chosen - r_rejected).

    The reward r is the model's head `score` (as of AutoModelForSequenceClassification with one
    label) on the hidden state of the text's last token.
    """
    score: nn.Module = model.score  # type: ignore[assignment]
    rewards = score(_hidden(model, batch.ids, batch.mask, batch.last)).float().squeeze(-1)
    chosen, rejected = rewards.chunk(2)
    return _preference(chosen, rejected, batch.weights)


def feature_loss(head: nn.Module, batch: FeatureBatch) -> tuple[Tensor, Parts]:
    """As `pair_loss`, with a head (a linear layer to one number) on cached features."""
    dtype = next(head.parameters()).dtype
    rewards = head(batch.features.to(dtype)).float().squeeze(-1)
    return _preference(rewards[:, 0], rewards[:, 1], batch.weights)


def _preference(chosen: Tensor, rejected: Tensor, weights: Tensor) -> tuple[Tensor, Parts]:
    """Rewards and weights are [pairs]; the part "accuracy" counts pairs in the right order."""
    loss = -(weights * functional.logsigmoid(chosen - rejected)).sum()
    return loss, {"accuracy": (weights * (chosen > rejected)).sum().detach()}


def _text_hidden(model: nn.Module, batch: TextBatch) -> Tensor:
    """Hidden states at the positions that predict a loss token, [n, hidden]."""
    if batch.owners is None:
        return _hidden(model, batch.ids, batch.mask, batch.positions)
    dtype = next(model.parameters()).dtype
    seen = _seen(batch.owners, dtype)
    return _hidden(model, batch.ids, seen, batch.positions, position_ids=batch.places)


def _seen(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """What each token may see, as scores to add, [rows, 1, width, width]."""
    width = owners.shape[1]
    kin = (owners[:, None, :] == owners[:, :, None]) | (owners == _ALL)[:, None, :]
    seen = kin & torch.ones(width, width, dtype=torch.bool, device=owners.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=owners.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _hidden(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, **more: Tensor | None
) -> Tensor:
    """Hidden states after the final norm, [n, hidden], at flattened positions [n]."""
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    states = trunk(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
    return states.flatten(0, 1).index_select(0, positions)  # type: ignore[no-any-return]


_AFTER_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # Cohere, Granite, Gemma


def check(model: nn.Module) -> None:
    """Raise InputError where the losses would not be those of plain transformers."""
    config: Any = model.config
    changed = [name for name in _AFTER_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
    if changed:
        raise InputError(
            f"{type(model).__name__}: logits changed by {changed[0]} are not supported"
        )


def _head(model: nn.Module) -> nn.Module:
    check(model)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return head


def _chunk(
    head: nn.Module,
    reference_head: nn.Module | None,
    vocabulary: int | None,
    hidden: Tensor,
    targets: Tensor,
    reference_hidden: Tensor,
) -> Tensor:
    """Sums of CE, H and KL over the positions of a chunk, [3] in float32."""
    logits = head(hidden).float()  # [n, vocabulary]
    log_p = functional.log_softmax(logits, dim=-1)
    ce = -log_p.gather(1, targets[:, None]).sum()
    entropy = -(log_p.exp() * log_p).sum()
    if reference_head is None:
        return torch.stack([ce, entropy, torch.zeros_like(ce)])
    with torch.no_grad():
        log_q = reference_head(reference_hidden).float()[:, :vocabulary]
        log_q = functional.log_softmax(log_q, dim=-1)
    if vocabulary is not None:
        log_p = functional.log_softmax(logits[:, :vocabulary], dim=-1)
    return torch.stack([ce, entropy, (log_q.exp() * (log_q - log_p)).sum()])


def _pad(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [texts, width]; what the padding's id is does not matter."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return ids, mask


def _longs(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)

"""What is trained on: examples, and the batches that they are collated into."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from alt_hpc.lm.prefix import ALL, NOBODY, padded

CHUNK = 512  # positions whose logits [CHUNK, vocabulary] are alive at once

B = TypeVar("B")


class Trainable(Protocol):
    """What the loop asks of an example."""

    @property
    def weight(self) -> int: ...  # loss tokens (pairs count 1): its share in the loss's normaliser
    @property
    def tokens(self) -> int: ...  # all that are computed
    def empty(self) -> Trainable: ...  # the cheapest one of its kind that teaches nothing
    @classmethod
    def batch(cls, rows: Sequence[Any], most: int) -> Any:
        """Collate `rows`; `most` is the largest weight that any rank collates at this moment."""


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
    reference: TextBatch | None = None  # the same answers behind what the reference is given


@dataclass(frozen=True)
class Example:
    """A conditioned prompt and what was written after it: tokens from `start` on are learned."""

    ids: list[int]
    start: int
    plain: list[int] | None = None  # the prompt as the reference is given it; None: the same

    @property
    def weight(self) -> int:
        return len(self.ids) - self.start

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def empty(self) -> Example:
        return Example(self.ids[:1], 1, self.plain and self.plain[:1])

    @classmethod
    def batch(cls, rows: Sequence[Example], most: int) -> TextBatch:
        texts = [(row.ids[: row.start], [row.ids[row.start :]], row.plain) for row in rows]
        return _text_batch(texts, most, together=False)


@dataclass(frozen=True)
class Siblings:
    """A conditioned prompt and several answers to it, the prompt computed once for all.

    They stand behind one another in one row; each sees the prompt and itself, and counts its
    positions from the prompt's end. `together` is False for models that cannot take such a row
    (see `prefix.side_by_side`): then each answer has the prompt to itself.
    """

    prompt: list[int]
    answers: list[list[int]]
    together: bool = True
    plain: list[int] | None = None  # the prompt as the reference is given it; None: the same

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
        texts = [(row.prompt, row.answers, row.plain) for row in rows]
        return _text_batch(texts, most, together=True)


def _text_batch(
    rows: Sequence[tuple[list[int], list[list[int]], list[int] | None]], most: int, together: bool
) -> TextBatch:
    """Rows of a prompt, its answers and its plain prompt; `together`: with owners and places."""
    texts = [[*prompt, *chain(*answers)] for prompt, answers, _ in rows]
    ids, mask = padded(texts), padded([[1] * len(text) for text in texts])
    owners, places = torch.full_like(ids, NOBODY), torch.zeros_like(ids)
    positions: list[int] = []
    targets: list[int] = []
    for i, (prompt, answers, _) in enumerate(rows):
        at = start = len(prompt)
        owners[i, :start] = ALL
        places[i, :start] = torch.arange(start)
        for number, answer in enumerate(answers):
            end = at + len(answer)
            owners[i, at:end] = number
            places[i, at:end] = torch.arange(start, start + len(answer))
            before = [start - 1, *range(at, end - 1)] if answer else []
            positions += [i * ids.shape[1] + place for place in before]
            targets += answer
            at = end
    where, what = (torch.tensor(v, dtype=torch.long) for v in (positions, targets))
    batch = TextBatch(ids, mask, where, what, chunks=max(1, -(-most // CHUNK)))
    if together:
        batch = dataclasses.replace(batch, owners=owners, places=places)
    if rows[0][2] is None:
        return batch
    plainly = [(plain or [], answers, None) for _, answers, plain in rows]
    return dataclasses.replace(batch, reference=_text_batch(plainly, most, together))


@dataclass(frozen=True)
class PairBatch:
    """All chosen texts, then all rejected ones."""

    ids: Tensor  # [2 * pairs, width], padded on the right
    mask: Tensor  # [2 * pairs, width]
    last: Tensor  # [2 * pairs], of each text's last token, into the flattened ids
    weights: Tensor  # [pairs], 0 for a pair that teaches nothing


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
        ids, mask = padded(texts), padded([[1] * len(text) for text in texts])
        last = torch.tensor([i * ids.shape[1] + len(text) - 1 for i, text in enumerate(texts)])
        return PairBatch(ids, mask, last, torch.tensor([float(row.weight) for row in rows]))


@dataclass(frozen=True)
class FeatureBatch:
    """Comparisons as features."""

    features: Tensor  # [pairs, 2, hidden]
    weights: Tensor  # [pairs]


@dataclass(frozen=True, eq=False)
class FeaturePair:
    """A comparison as features of a trunk that is not trained, [2, hidden]: chosen first."""

    features: Tensor
    weight: int = 1
    tokens: int = 0

    def empty(self) -> FeaturePair:
        return FeaturePair(self.features, 0)

    @classmethod
    def batch(cls, rows: Sequence[FeaturePair], most: int) -> FeatureBatch:
        weights = torch.tensor([float(row.weight) for row in rows])
        return FeatureBatch(torch.stack([row.features for row in rows]), weights)


def move(batch: B, device: torch.device) -> B:
    """The same batch with its tensors on `device`."""
    values = vars(batch).items()
    moved: dict[str, Any] = {key: v.to(device) for key, v in values if isinstance(v, Tensor)}
    moved |= {key: move(v, device) for key, v in values if isinstance(v, TextBatch)}
    return dataclasses.replace(batch, **moved)  # type: ignore[type-var]

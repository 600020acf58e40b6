"""What is trained on: examples, and the batches that they are collated into.

Of an example the loop asks its `weight` (loss tokens; pairs count 1: its share in the loss's
normaliser), its `tokens` (all that are computed), `empty()`, the cheapest one of its kind that
teaches nothing, and `batch(rows, most)`, which collates examples of its kind: `most` is the
largest weight that any rank collates at this moment.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alt_hpc.lm.prefix import NOBODY, laid, padded
from alt_hpc.training.memory import CHUNK


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
    reference: "TextBatch | None" = None  # the same answers behind what the reference is given


@dataclass(frozen=True)
class Siblings:
    """A prompt and the answers to it that are learned, what they share of it computed once.

    They stand behind one another in one row, each behind its own `tail`: the end of the prompt,
    where its feedback stands there. Each sees prompt, tail and itself, and counts its positions
    from the prompt's end. `together` is False for models that cannot take such a row (see
    `prefix.side_by_side`): then each answer has the prompt to itself.
    """

    prompt: list[int]
    answers: list[list[int]]
    together: bool = True
    plain: list[int] | None = None  # the prompt as the reference is given it; None: the same
    tails: list[list[int]] | None = None  # None: all are empty

    @property
    def weight(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.weight + sum(map(len, self.tails or []))

    @property
    def both(self) -> list[tuple[list[int], list[int]]]:
        """Tail and answer of each."""
        return list(zip(self.tails or [[] for _ in self.answers], self.answers, strict=True))

    def empty(self) -> "Siblings":
        return Siblings(self.prompt[:1], [], self.together, self.plain and self.plain[:1])

    def alone(self) -> list["Siblings"]:
        """Each answer with the prompt to itself."""
        return [
            Siblings([*self.prompt, *t], [answer], False, self.plain) for t, answer in self.both
        ]

    @staticmethod
    def batch(rows: Sequence["Siblings"], most: int) -> TextBatch:
        first, chunks = rows[0], max(1, -(-most // CHUNK))
        if not first.together:
            rows = [alone for row in rows for alone in row.alone()] or [first]
        ids, owners, places = laid([(row.prompt, [t + a for t, a in row.both]) for row in rows])
        learned = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            end = len(row.prompt)
            for tail, answer in row.both:
                start, end = end + len(tail), end + len(tail) + len(answer)
                learned[i, start:end] = True
        mask = (owners != NOBODY).long()
        # What predicts a token stands before it; an answer's first is predicted by the prompt.
        starts = torch.tensor([[len(row.prompt)] for row in rows])
        before = torch.where(places == starts, starts, torch.arange(ids.shape[1])) - 1
        positions = (before + torch.arange(len(rows))[:, None] * ids.shape[1])[learned]
        batch = TextBatch(ids, mask, positions, ids[learned], chunks)
        if first.together:
            batch = dataclasses.replace(batch, owners=owners, places=places)
        if first.plain is not None:
            plainly = [Siblings(row.plain or [], row.answers, row.together) for row in rows]
            batch = dataclasses.replace(batch, reference=Siblings.batch(plainly, most))
        return batch


class Example(Siblings):
    """A conditioned prompt and what was written after it: tokens from `start` on are learned."""

    def __init__(self, ids: list[int], start: int) -> None:
        super().__init__(ids[:start], [ids[start:]], together=False)

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answers[0]]

    @property
    def start(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class PairBatch:
    """All chosen texts, then all rejected ones."""

    ids: Tensor  # [2 * pairs, width], padded on the right
    mask: Tensor  # [2 * pairs, width]
    positions: Tensor  # [2 * pairs], of each text's last token, into the flattened ids
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

    def empty(self) -> "Pair":
        return Pair(self.chosen[:1], self.rejected[:1], 0)

    @staticmethod
    def batch(rows: Sequence["Pair"], most: int) -> PairBatch:
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

    def empty(self) -> "FeaturePair":
        return FeaturePair(self.features, 0)

    @staticmethod
    def batch(rows: Sequence["FeaturePair"], most: int) -> FeatureBatch:
        weights = torch.tensor([float(row.weight) for row in rows])
        return FeatureBatch(torch.stack([row.features for row in rows]), weights)


Trainable = Siblings | Pair | FeaturePair


def move(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on `device`."""
    values = vars(batch).items()
    moved = {key: v.to(device) for key, v in values if isinstance(v, Tensor)}
    moved |= {key: move(v, device) for key, v in values if isinstance(v, TextBatch)}
    return dataclasses.replace(batch, **moved)

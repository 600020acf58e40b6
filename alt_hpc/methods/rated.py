"""What methods share whose reward rates answers in levels: a level is a quantile."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import Label
from alt_hpc.methods.ranked import Ranked
from alt_hpc.settings import LARGEST


class Rated(Ranked):
    """A reward is a whole number from 0, the worst; quantiles differ in size, or are empty.

    Of each `per_quantile` generations are trained on; where one has fewer, any others take their
    place, so that a prompt has as many as it can (METHOD: 8 a prompt, 2 of each score).
    """

    quantiles: Annotated[int, Field(ge=2, le=LARGEST)] = 4
    """Levels that the reward rates in."""
    remainder: Literal["spread"] = "spread"
    pool: Literal["prompt"] = "prompt"

    @property
    def rated(self) -> int | None:
        return self.quantiles

    def placed(self, rewards: Sequence[float]) -> list[int | None]:
        return paper.rated(rewards, self.quantiles)

    def kept(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        keep, count = self.per_quantile, self.per_quantile * len(self.trained_on)
        return paper.filled(self.wanted(label), finished, keep, count, rng)

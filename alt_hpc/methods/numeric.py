"""numeric: the SteerLM baseline. Feedback is a number in the place of words (arXiv 2310.05344)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from alt_hpc.errors import InputError
from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import Label
from alt_hpc.methods.ranked import Ranked
from alt_hpc.settings import GIVES_KIND

ATTRIBUTES = [  # of the categories of HH, best first
    *("harmful:0,helpful:2", "harmful:0,helpful:1", "harmful:0,helpful:0", "harmful:1,helpful:0")
]


class Settings(Ranked):
    """`{number}.`, an empty line, the prompt. For any reward, or for a judge's four categories.

    A reward's number is its quantile within the prompt, 0 the best; with `pool: iteration` its bin
    over the iteration, as many answers in each, the highest number the best.
    """

    model_config = GIVES_KIND
    defaults: ClassVar[Mapping[str, Any]] = {"domain.template": "{feedback}.\n\n{prompt}"}

    kind: Literal["numeric"] = "numeric"
    of: Literal["rewards", "categories"] = "rewards"
    """`categories`: `harmful:0,helpful:2` ... for those that a judge picks, as kind `categories`;
    then `quantiles: 4`."""

    def check(self) -> None:
        super().check()
        if self.of == "categories" and self.quantiles != len(ATTRIBUTES):
            raise InputError(f"there are {len(ATTRIBUTES)} categories", "method.quantiles")
        if self.of == "categories" and self.pool == "iteration":
            raise InputError("an answer's category is its own: not of: categories", "method.pool")

    @property
    def rated(self) -> int | None:
        return self.quantiles if self.of == "categories" else None

    @property
    def title(self) -> str:
        return "Numeric"

    @property
    def levels(self) -> list[str]:
        if self.of == "categories":
            return ATTRIBUTES
        numbers = [str(number) for number in range(self.quantiles)]
        return numbers[::-1] if self.pool == "iteration" else numbers

    def placed(self, rewards: Sequence[float]) -> list[int | None]:
        of_judge = self.of == "categories"
        return paper.rated(rewards, self.quantiles) if of_judge else super().placed(rewards)

    def kept(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        if self.of == "rewards":
            return super().kept(label, finished, rng)
        keep, count = self.per_quantile, self.per_quantile * len(self.trained_on)
        return paper.filled(self.wanted(label), finished, keep, count, rng)

"""best: a control. Filtered fine-tuning: the best quantile alone, without a word."""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from alt_hpc.errors import InputError
from alt_hpc.methods import none
from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import Choice, Label
from alt_hpc.settings import GIVES_KIND


class Settings(none.Settings):
    """As `words`: as many generations of each draw, but all of them from its quantile 0.

    Where that has fewer, they are taken again in the same order: the number stays the same. So each
    draw must have some, which it need not where several are put in order together.
    """

    model_config = GIVES_KIND

    kind: Literal["best"] = "best"  # type: ignore[assignment]

    def check(self) -> None:
        super().check()
        together = {"pool": self.pool == "iteration", "history": self.history > 0}
        for key in filter(together.get, together):
            problem = "a draw may have no answer in the pool's best quantile: not with kind: best"
            raise InputError(problem, f"method.{key}")

    def select(
        self, label: Label, finished: Sequence[bool], rng: np.random.Generator
    ) -> list[Choice]:
        chosen = super().select(label, finished, rng)
        best = [quantile if quantile == 0 else None for quantile in label.quantiles]
        some = itertools.cycle(paper.select(best, finished, len(chosen), rng))
        return [one._replace(generation=next(some)) for one in chosen]

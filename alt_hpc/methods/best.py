"""best: a control. Filtered fine-tuning: the best quantile alone, without a word."""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from alt_hpc.methods import none
from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import Label
from alt_hpc.settings import GIVES_KIND


class Settings(none.Settings):
    """As `words`: as many generations of each prompt, but all of them from its quantile 0.

    Where that has fewer, they are taken again in the same order: the number stays the same.
    """

    model_config = GIVES_KIND

    kind: Literal["best"] = "best"  # type: ignore[assignment]

    def kept(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        count = len(super().kept(label, finished, rng))
        best = [quantile if quantile == 0 else None for quantile in label.quantiles]
        some = paper.select(best, finished, count, rng)
        return list(itertools.islice(itertools.cycle(some), count))

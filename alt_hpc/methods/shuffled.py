"""shuffled: a control. What ALT-RM trains on, a prompt's words dealt out again by chance."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alt_hpc.methods import words
from alt_hpc.methods.method import Choice, Label
from alt_hpc.settings import GIVES_KIND


class Settings(words.Settings):
    """As `words`: the same generations, and as many of each word behind each prompt."""

    model_config = GIVES_KIND

    kind: Literal["shuffled"] = "shuffled"  # type: ignore[assignment]

    @property
    def title(self) -> str:
        return f"Control: {self.kind}"

    def select(
        self, label: Label, finished: Sequence[bool], rng: np.random.Generator
    ) -> list[Choice]:
        chosen = super().select(label, finished, rng)
        dealt = [chosen[i] for i in rng.permutation(len(chosen))]
        both = zip(chosen, dealt, strict=True)
        return [word._replace(generation=one.generation) for one, word in both]

"""none: a control. What ALT-RM trains on, each without its word."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alt_hpc.methods import words
from alt_hpc.methods.method import NOTHING, Asking, Choice, Known, Label, Row
from alt_hpc.settings import GIVES_KIND


class Settings(words.Settings):
    """As `words`, whose prompts leave room for the words here too."""

    model_config = GIVES_KIND

    kind: Literal["none"] = "none"  # type: ignore[assignment]

    @property
    def title(self) -> str:
        return f"Control: {self.kind}"

    def asked(self, iteration: int) -> tuple[Asking, ...]:
        return ("plain",)

    def ask(self, how: Asking, row: Row, known: Known = NOTHING, seed: int = 0) -> str | None:
        return None

    def select(
        self, label: Label, finished: Sequence[bool], rng: np.random.Generator
    ) -> list[Choice]:
        return [one._replace(feedback=None) for one in super().select(label, finished, rng)]

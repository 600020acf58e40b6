"""unfiltered: a control. ALT-RM that does not prefer finished generations."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alt_hpc.methods import words
from alt_hpc.methods.method import Label
from alt_hpc.settings import GIVES_KIND


class Settings(words.Settings):
    """As `words`, but of each quantile any generations are kept, whether they ended or not."""

    model_config = GIVES_KIND

    kind: Literal["unfiltered"] = "unfiltered"  # type: ignore[assignment]

    @property
    def title(self) -> str:
        return f"Control: {self.kind}"

    def kept(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        return super().kept(label, [True] * len(finished), rng)

"""words: ALT-RM. Rewards are put in order, each quantile has a word (arXiv 2407.16970)."""

from typing import Literal

from pydantic import Field

from alt_hpc.errors import InputError
from alt_hpc.methods.ranked import Ranked


class Settings(Ranked):
    """The words, best first, and how generations come into their quantiles."""

    kind: Literal["words"] = "words"
    texts: list[str] = Field(["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."])

    def check(self) -> None:
        super().check()
        if len(self.texts) != self.quantiles:
            problem = f"{len(self.texts)} feedback texts for {self.quantiles} quantiles"
            raise InputError(problem, "method.texts")
        if len(set(self.texts)) != len(self.texts):
            raise InputError("the feedback texts must differ from one another", "method.texts")
        for i, text in enumerate(self.texts):
            if not text.strip():
                raise InputError("the feedback text is empty", f"method.texts[{i}]")

    @property
    def title(self) -> str:
        return "ALT-RM"

    @property
    def levels(self) -> list[str]:
        return self.texts

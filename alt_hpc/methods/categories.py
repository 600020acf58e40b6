"""categories: ALT-LMC. A judge puts each answer into one of a few categories (arXiv 2407.16970).

The authors find the plain prompt again by a split at `.` and an empty line, which damages prompts
that have one themselves; here a prompt is never parsed back.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from alt_hpc.judges.rate import HARMLESS
from alt_hpc.methods import words
from alt_hpc.methods.rated import Rated
from alt_hpc.settings import GIVES_KIND


class Settings(Rated, words.Settings):
    """`{category}.`, an empty line, the prompt; the categories best first, as the judge rates."""

    model_config = GIVES_KIND
    defaults: ClassVar[Mapping[str, Any]] = {"domain.template": "{feedback}.\n\n{prompt}"}

    kind: Literal["categories"] = "categories"  # type: ignore[assignment]
    texts: list[str] = Field([*HARMLESS])

    @property
    def title(self) -> str:
        return "ALT-LMC"

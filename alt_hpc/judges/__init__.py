"""Judges: language models that compare or rate; never the reward model. A kind is one file.

`JUDGES` is the table of them; a module's `Settings` is the judge.
"""

from types import ModuleType

from alt_hpc.judges import endpoint, model
from alt_hpc.judges.judge import (
    Answer,
    Asker,
    Given,
    Judge,
    Purse,
    Question,
    Reply,
    answers,
    fitted,
)
from alt_hpc.settings import one_of

JUDGES: dict[str, ModuleType] = {"model": model, "endpoint": endpoint}

AnyJudge = one_of(JUDGES, "model")  # what pydantic reads where a judge stands

__all__ = [
    "JUDGES",
    "Answer",
    "AnyJudge",
    "Asker",
    "Given",
    "Judge",
    "Purse",
    "Question",
    "Reply",
    "answers",
    "fitted",
]

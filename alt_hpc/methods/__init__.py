"""Methods: scored generations become training data. A kind is one file and one row."""

from types import ModuleType

from alt_hpc.methods import (
    best,
    categories,
    none,
    numeric,
    quark,
    shuffled,
    unfiltered,
    words,
    written,
)
from alt_hpc.methods.method import Choice, Known, Label, LossView, Method

METHODS: dict[str, ModuleType] = {  # a module's `Settings` is the method
    "words": words,
    "quark": quark,
    "written": written,
    "categories": categories,
    "numeric": numeric,
    "none": none,  # this and those below are controls
    "best": best,
    "shuffled": shuffled,
    "unfiltered": unfiltered,
}

__all__ = ["METHODS", "Choice", "Known", "Label", "LossView", "Method"]

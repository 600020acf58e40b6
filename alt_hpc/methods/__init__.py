"""Methods: scored generations become training data. A kind is one file and one row."""

from types import ModuleType

from alt_hpc.methods import best, none, quark, shuffled, unfiltered, words
from alt_hpc.methods.method import Choice, Label, LossView, Method

METHODS: dict[str, ModuleType] = {  # a module's `Settings` is the method
    "words": words,
    "quark": quark,
    "none": none,  # this and those below are controls
    "best": best,
    "shuffled": shuffled,
    "unfiltered": unfiltered,
}

__all__ = ["METHODS", "Choice", "Label", "LossView", "Method"]

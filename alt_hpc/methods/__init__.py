"""Methods: scored generations become training data. A kind is one file and one row."""

from types import ModuleType

from alt_hpc.methods import words
from alt_hpc.methods.method import Label, LossView, Method

METHODS: dict[str, ModuleType] = {"words": words}  # a module's `Settings` is the method

__all__ = ["METHODS", "Label", "LossView", "Method"]

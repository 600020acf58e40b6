"""Methods: how scored generations become training data and conditioning. A kind is one file.

`METHODS` is the table of them; a module's `Settings` is the method.
"""

from types import ModuleType

from alt_hpc.methods import words
from alt_hpc.methods.method import Label, LossView, Method

METHODS: dict[str, ModuleType] = {"words": words}

__all__ = ["METHODS", "Label", "LossView", "Method"]

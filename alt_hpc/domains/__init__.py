"""Domains: how an example becomes text, and where feedback stands in it. A kind is one file.

`DOMAINS` is the table of them; a module's `Settings` is the domain.
"""

from types import ModuleType

from alt_hpc.domains import tldr
from alt_hpc.domains.domain import Domain

DOMAINS: dict[str, ModuleType] = {"tldr": tldr}

__all__ = ["DOMAINS", "Domain"]

"""The table of domains; a kind is one file, whose `Settings` is the domain."""

from types import ModuleType

from alt_hpc.domains import tldr
from alt_hpc.domains.domain import Domain

DOMAINS: dict[str, ModuleType] = {"tldr": tldr}

__all__ = ["DOMAINS", "Domain"]

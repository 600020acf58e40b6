"""The table of domains; a kind is one file, whose `Settings` is the domain."""

from types import ModuleType

from alt_hpc.domains import plain, tldr
from alt_hpc.domains.domain import Domain

DOMAINS: dict[str, ModuleType] = {"tldr": tldr, "plain": plain}

__all__ = ["DOMAINS", "Domain"]

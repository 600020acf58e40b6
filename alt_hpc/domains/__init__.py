"""The table of domains; a kind is one file, whose `Settings` is the domain."""

from types import ModuleType

from alt_hpc.domains import chat, plain, tldr
from alt_hpc.domains.domain import Domain

DOMAINS: dict[str, ModuleType] = {"tldr": tldr, "plain": plain, "chat": chat}

__all__ = ["DOMAINS", "Domain"]

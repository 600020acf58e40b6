"""Engines: what generates answers. A kind is one file and one row."""

from types import ModuleType

from alt_hpc.engines import exact, vllm
from alt_hpc.engines.engine import Ask, Decoding, Engine, Generator, Model

ENGINES: dict[str, ModuleType] = {"exact": exact, "vllm": vllm}  # a module's `Settings` is one

__all__ = ["ENGINES", "Ask", "Decoding", "Engine", "Generator", "Model"]

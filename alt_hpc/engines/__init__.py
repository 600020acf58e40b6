"""Engines: what generates answers. A kind is one file.

`ENGINES` is the table of them; a module's `Settings` is the engine.
"""

from types import ModuleType

from alt_hpc.engines import exact, vllm
from alt_hpc.engines.engine import Ask, Decoding, Engine, Generator, Model

ENGINES: dict[str, ModuleType] = {"exact": exact, "vllm": vllm}

__all__ = ["ENGINES", "Ask", "Decoding", "Engine", "Generator", "Model"]

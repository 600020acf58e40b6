"""What an engine is: it generates answers. Sampling and evaluation go through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from alt_hpc.lm.tokens import Generation
from alt_hpc.settings import Settings

if TYPE_CHECKING:
    import torch


class Ask(NamedTuple):
    """A prompt to be answered, and the row that it comes from."""

    ids: list[int]
    seed: int
    row: Mapping[str, Any] = MappingProxyType({})


class Decoding(NamedTuple):
    """How answers are generated."""

    answers: int  # to each prompt
    temperature: float  # 0: greedy, one answer
    top_p: float
    max_new_tokens: int
    group: int  # prompts that are computed together, or in flight
    silent: tuple[int, ...] = ()  # token ids that are never generated


class Model(NamedTuple):
    """The policy that generates."""

    place: Path
    dtype: str
    ends: tuple[int, ...]  # token ids that end a generation
    context: int  # the most tokens that a prompt and its generation have together
    device: "torch.device"  # where to compute; vLLM finds that out by itself


Groups: TypeAlias = Iterable[Sequence[Ask]]  # of prompts
Generations: TypeAlias = Iterator[list[list[Generation]]]  # of each group, of each prompt, in order


class Generator(NamedTuple):
    """An engine with a policy loaded."""

    together: bool  # whether a group's prompts are kept, or lost, at once; else each by itself
    sample: Callable[[Groups, Decoding], Generations]  # as a stream


class Engine(Settings):
    """An engine's settings, and what is made of them."""

    kind: str

    @property
    def fills_memory(self) -> bool:
        """Whether it takes most of its GPU's memory, whatever the model."""
        return False

    def check(self, place: Path) -> None:
        """Raise InputError where it cannot generate from a policy, before anything is queued."""

    def load(self, model: Model) -> Generator:
        """Ready to generate. Raises InputError where the policy or the engine is missing."""
        raise NotImplementedError

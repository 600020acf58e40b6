"""What a reward is: where the signal comes from. It gives each generation a number, or words."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alt_hpc.domains import Domain
from alt_hpc.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answers:
    """A prompt's answers, to be scored together."""

    prompt: str  # raw, never conditioned
    texts: Sequence[str]
    row: Mapping[str, Any] = field(default_factory=dict)  # the row that they stand in


@dataclass(frozen=True)
class Scored:
    """What a reward says of a prompt's answers."""

    rewards: Sequence[float]  # one each; not finite: the answer is set aside
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of a sum, by name
    feedback: Sequence[str | None] | None = None  # where it writes any
    shortened: bool = False  # whether the prompt was too long for it


class Scorer(Protocol):
    """A reward, loaded."""

    # In order, as a stream: it may take some answers ahead of what it has given.
    def score(self, groups: Iterable[Answers]) -> Iterator[Scored]: ...


@dataclass(frozen=True)
class Named:
    """A model that a config names: hub name or folder; not whole: its config and tokenizer."""

    name: str
    whole: bool = True


@dataclass(frozen=True)
class Given:
    """What a reward may use when it is loaded."""

    place: Callable[[str], Path]  # a model's folder, by the key of the settings that names it
    made: Path | None  # the folder of the model that the run has trained, if it trains one
    domain: Domain
    new_tokens: int  # kept free for an answer when a prompt is shortened, whatever the answers
    device: "torch.device"


class Reward(Settings):
    """A reward's settings, and what is made of them."""

    kind: str

    @property
    def trained(self) -> bool:
        """Whether the run trains its model first, in the stage `reward-model`."""
        return False

    def named(self) -> dict[str, Named]:
        """The models that it names, by their keys in these settings."""
        return {}

    def check(self, place: Callable[[str], Path], domain: Domain, new_tokens: int) -> None:
        """Raise InputError where `load` or `score` would, before anything is queued."""

    def load(self, given: Given) -> Scorer:
        """Ready to score, on the device that is given."""
        raise NotImplementedError

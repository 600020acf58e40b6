"""What a reward is: where the signal comes from. It gives each generation a number, or words."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError
from alt_hpc.judges import Asker, Judge
from alt_hpc.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answers:
    """A prompt's answers, to be scored together."""

    prompt: str  # raw, never conditioned
    texts: Sequence[str]
    row: Mapping[str, Any] = field(default_factory=dict)  # of the data, with its further columns
    number: int = 0  # of the data row, from 0
    of: str = ""  # the set, or split, that it is a row of


@dataclass(frozen=True)
class Scored:
    """What a reward says of a prompt's answers."""

    rewards: Sequence[float]  # one each; not finite: the answer is set aside
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of a sum, by name
    feedback: Sequence[str | None] | None = None  # where it writes any
    tries: Sequence[int] | None = None  # of a judge, at each answer; the first: at temperature 0
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


class File(NamedTuple):
    """A user's file: where it is read, and where it was when the run was submitted."""

    kept: Path
    original: Path

    def text(self, name: str) -> str:
        """What it says; InputError where it is no text. Sentences call it `name`."""
        try:
            return self.kept.read_text(encoding="utf-8")
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise InputError(f"{name}: {reason}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text") from error


@dataclass(frozen=True)
class Found:
    """What the names in a reward's settings stand for, by their keys."""

    place: Callable[[str], Path]  # a model's folder
    file: Callable[[str], File]
    domain: Domain
    new_tokens: int  # kept free for an answer when a prompt is shortened, whatever the answers

    def within(self, at: str) -> Self:
        """The same for settings that stand within these."""
        place, file = self.place, self.file
        return replace(self, place=lambda k: place(f"{at}.{k}"), file=lambda k: file(f"{at}.{k}"))


@dataclass(frozen=True)
class Given(Found):
    """What a reward may use when it is loaded."""

    made: Path | None  # the folder of the model that the run has trained, if it trains one
    device: "torch.device"
    # A judge that stands at a key of these settings, ready to be asked; its replies are kept.
    asker: Callable[[str, Judge], Asker] | None = None

    def within(self, at: str) -> Self:
        it, asker = super().within(at), self.asker
        return replace(it, asker=asker and (lambda key, judge: asker(f"{at}.{key}", judge)))


class Reward(Settings):
    """A reward's settings, and what is made of them."""

    kind: str

    @property
    def trained(self) -> bool:
        """Whether the run trains its model first, in the stage `reward-model`."""
        return False

    @property
    def rates(self) -> int | None:
        """The levels that it rates in, from 0, the worst; 0: any number; None: not known before."""
        return 0

    @property
    def writes(self) -> bool:
        """Whether it gives feedback in words, beside the number."""
        return False

    def singles(self) -> "dict[str, Reward]":
        """Itself, or those that it is made of, by where they stand within it (`.parts.NAME`)."""
        return {"": self}

    def to_train(self) -> "dict[str, Reward]":
        """The one whose model the run trains, itself or a part, by where it stands within it."""
        return {at: single for at, single in self.singles().items() if single.trained}

    def weight(self, part: str) -> float:
        """What a part counts in the sum."""
        return 1.0

    def named(self) -> dict[str, Named]:
        """The models that it names, by their keys in these settings."""
        return {}

    def files(self) -> dict[str, str]:
        """The user's files that it names, by their keys; a run keeps a copy of each."""
        return {}

    def check_keys(self) -> None:
        """Raise InputError, with its field, where its settings contradict each other."""

    def check(self, found: Found) -> None:
        """Raise InputError where `load` or `score` would, before anything is queued."""

    def load(self, given: Given) -> Scorer:
        """Ready to score, on the device that is given."""
        raise NotImplementedError

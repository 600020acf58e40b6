"""What a judge is: a language model that is asked questions, each answered by a text.

It knows no run: what may be spent and what was answered before is handed to it.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from alt_hpc.settings import Settings

if TYPE_CHECKING:
    import torch

    from alt_hpc.engines import Engine, Generator, Model

T = TypeVar("T")
AGAIN = 0.7  # the temperature of further tries


class Question(NamedTuple):
    """What a judge is asked."""

    text: str
    seed: int
    max_tokens: int  # of the answer
    temperature: float = 0.0


class Reply(NamedTuple):
    """What it said."""

    text: str | None  # None: nothing, and asking again would not help
    why: str = ""  # where it said nothing
    read: int = 0  # tokens
    written: int = 0
    dollars: float = 0.0


class Asker(Protocol):
    """A judge, loaded."""

    def ask(self, questions: Iterable[Question]) -> Iterator[Reply]:
        """A reply to each, in order, as a stream: some questions are taken ahead.

        What was answered before is not asked again. InputError where no more may be spent, or the
        endpoint refuses the key or knows no such model; another error where it does not answer.
        """
        ...

    def lost(self, question: Question) -> int:
        """How many tokens too long a question is; 0 where it fits, or nobody knows."""
        ...


class Purse(Protocol):
    """What a judge may spend, over all tries of all tasks of a run."""

    def hold(self, dollars: float) -> str:
        """Set aside what a request may cost; returns its id. InputError where too little is left.

        What is never settled counts as spent.
        """
        ...

    def settle(self, held: str, dollars: float) -> None:
        """Say what it did cost."""
        ...


@dataclass(frozen=True)
class Given:
    """What a judge may use when it is loaded."""

    place: Callable[[str], Path]  # the folder of a model that it names, by its key
    device: "Callable[[], torch.device]"
    known: Callable[[Question], Reply | None]  # what was answered before
    keep: Callable[[Question, Reply], None]  # at once: from any thread
    purse: Purse
    tasks: int = 1  # that ask it at once, at most
    # How an engine loads a model: a task that makes several shards does so once.
    generator: "Callable[[Engine, Model], Generator]" = lambda engine, model: engine.load(model)


class Judge(Settings):
    """A judge's settings, and what is made of them."""

    kind: str
    model: str

    @property
    def who(self) -> str:
        """The model, however it is run: a judge that wrote feedback does not evaluate it."""
        folder = os.path.expanduser(self.model)
        return os.path.realpath(folder) if os.path.isdir(folder) else self.model

    @property
    def most(self) -> float | None:
        """How many dollars may be spent in all; None: it costs nothing."""
        return None

    def named(self) -> dict[str, tuple[str, bool]]:
        """The models that it names, by key: name, and whether its weights are wanted too."""
        return {}

    def check_keys(self) -> None:
        """Raise InputError, with its field, where its settings contradict each other."""

    def check(self, place: Callable[[str], Path]) -> None:
        """Raise InputError where `load` or asking would, before anything is queued or paid."""

    def cost(self, questions: int, size: int, max_tokens: int) -> float:
        """At most so many dollars for questions of `size` bytes of text in all, asked once."""
        return 0.0

    def load(self, given: Given) -> Asker:
        """Ready to be asked."""
        return _Remembering(self.ready(given), given.known)

    def ready(self, given: Given) -> Asker:
        """The same, without a memory: it asks all that it is given, and keeps each reply."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Remembering:
    asker: Asker
    known: Callable[[Question], Reply | None]

    def ask(self, questions: Iterable[Question]) -> Iterator[Reply]:
        first, second = itertools.tee((q, self.known(q)) for q in questions)
        asked = self.asker.ask(q for q, reply in first if reply is None)
        for _, reply in second:
            yield next(asked) if reply is None else reply

    def lost(self, question: Question) -> int:
        return self.asker.lost(question)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What was made of a judge's replies to one question."""

    value: T | None  # None: no reply could be read
    replies: tuple[Reply, ...]  # of all tries, the last one counts

    @property
    def dollars(self) -> float:
        return sum(reply.dollars for reply in self.replies)


def answers(
    asker: Asker, questions: Sequence[Question], read: Callable[[str], T | None], tries: int
) -> list[Answer[T]]:
    """What `read` makes of the replies; where it makes None, the question is asked again.

    Up to `tries` times in all: the first as it is, further ones at temperature 0.7, each with its
    own seed (METHOD, feedback in words). All that are asked again are asked together.
    """
    found = [Answer[T](None, ()) for _ in questions]
    left = list(range(len(questions)))
    for number in range(tries):
        asked = [_again(questions[i], number) for i in left]
        for i, reply in zip(left, asker.ask(asked), strict=True):
            value = None if reply.text is None else read(reply.text)
            found[i] = Answer(value, (*found[i].replies, reply))
        left = [i for i in left if found[i].value is None and found[i].replies[-1].text is not None]
    return found


def _again(question: Question, number: int) -> Question:
    if not number:
        return question
    return question._replace(seed=(question.seed + number) % 2**63, temperature=AGAIN)


def fitted(asker: Asker, post: str, make: Callable[[str], Question]) -> tuple[Question, bool]:
    """The question made of a post, which loses its end where it is too long; whether it has."""
    question = make(post)
    if not asker.lost(question):
        return question, False
    fits, too_long = 0, len(post)  # characters
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (fits, middle) if asker.lost(make(post[:middle])) else (middle, too_long)
    return make(post[:fits]), True

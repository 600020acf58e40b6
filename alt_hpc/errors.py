"""What a user is meant to read: a sentence naming what is wrong and where."""

import contextlib
from collections.abc import Iterator
from pickle import UnpicklingError


class Final(Exception):
    """An error that does not get better: no further try is made."""


class TrainingDiverged(Final):
    """A loss, gradient norm or weight is not finite; nothing was exported."""


class InputError(Final):
    """Wrong input: one sentence that names file, line and field.

    The command line adds the line of the config where `field` stands (`config.located`), prints
    the sentence to stderr and exits with status 2; nothing has been queued.
    """

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.problem = problem
        self.field = field  # of the config, such as `policy.model`; empty where none is to blame
        self.number = 0  # of that config, where a command was given several


@contextlib.contextmanager
def blaming(field: str) -> Iterator[None]:
    """Give errors from within the config's field that they are about, if they name none.

    One whose field begins with a dot, a key of some section, is put behind the section.
    """
    try:
        yield
    except InputError as error:
        if error.field and (field.startswith(".") or not error.field.startswith(".")):
            raise
        raise InputError(error.problem, field + error.field) from error


@contextlib.contextmanager
def of_config(number: int) -> Iterator[None]:
    """Note which config, of several that a command was given, an error is about."""
    try:
        yield
    except InputError as error:
        error.number = number
        raise


def one_line(text: str) -> str:
    """A text as it may stand in a sentence: unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def said(error: BaseException) -> str:
    """What a library's error says, on one line; its name where it says nothing."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors"
    return " ".join(str(error).split())[:300] or type(error).__name__

"""model: a model that an engine runs within the task itself; no server, no network."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alt_hpc.engines import ENGINES, Ask, Decoding, Engine, Generator, Model
from alt_hpc.errors import InputError, blaming
from alt_hpc.judges.judge import Asker, Given, Judge, Question, Reply
from alt_hpc.lm import tokens
from alt_hpc.settings import Count, Dtype, key, one_of

if not TYPE_CHECKING:  # what pydantic reads
    Engine = one_of(ENGINES, "exact")


class Settings(Judge):
    """A causal language model. Where its tokenizer has a chat template, it is asked as a user."""

    kind: Literal["model"] = "model"
    model: str
    """Hub name or folder."""
    tokenizer: str | None = key(None, "Where the model's folder has none.")
    dtype: Dtype = "bfloat16"
    max_length: Count | None = key(None, "Tokens of question and answer; default: its context.")
    group: Count = key(8, "Questions that are computed together (vLLM: so many in flight).")
    engine: Engine = key(ENGINES["exact"].Settings(), "What runs it.")

    def named(self) -> dict[str, tuple[str, bool]]:
        own = {"model": (self.model, True)}
        return own | ({"tokenizer": (self.tokenizer, False)} if self.tokenizer else {})

    def check(self, place: Callable[[str], Path]) -> None:
        from alt_hpc.lm import check, load

        folder = place("model")
        with blaming(".model"):
            check.weights(folder)
            home = place("tokenizer") if self.tokenizer else folder
            if not tokens.all_ends(folder, load.tokenizer(home)):
                names_none = "neither model nor tokenizer names a token that ends a text"
                raise InputError(f"{folder}: {names_none}")
            self.engine.check(folder)
            context = tokens.context_length(load.config(folder), unknown=self.max_length)
        if (self.max_length or 0) > context:
            raise InputError(f"{self.max_length}, but it reads {context} tokens", ".max_length")

    def ready(self, given: Given) -> Asker:
        from alt_hpc.lm import load

        folder = given.place("model")
        words = load.tokenizer(given.place("tokenizer") if self.tokenizer else folder)
        context = tokens.context_length(load.config(folder), unknown=self.max_length)
        context, ends = min(context, self.max_length or context), tokens.all_ends(folder, words)
        model = Model(folder, self.dtype, ends, context, given.device())
        loaded = given.generator(self.engine, model)
        return _Loaded(loaded, words, ends, context, self.group, given.keep)


class _Loaded:
    """The asker of kind `model`."""

    def __init__(
        self,
        engine: Generator,
        tokenizer: tokens.Tokenizer,
        ends: tuple[int, ...],
        context: int,
        group: int,
        keep: Callable[[Question, Reply], None],
    ) -> None:
        self.engine, self.tokenizer, self.ends, self.context = engine, tokenizer, ends, context
        self.group, self.keep = group, keep

    def ask(self, questions: Iterable[Question]) -> Iterator[Reply]:
        first, second = itertools.tee((question, self.lost(question)) for question in questions)
        made = self._made(question for question, lost in first if not lost)
        for _, lost in second:
            yield Reply(None, f"{lost} tokens too long") if lost else next(made)

    def _made(self, questions: Iterable[Question]) -> Iterator[Reply]:
        of = itertools.groupby(questions, lambda q: (q.temperature, q.max_tokens))
        for (temperature, most), alike in of:  # consumed within its turn
            decoding = Decoding(1, temperature, 1.0, most, self.group)
            size = self.group if self.engine.together else 1  # as many are in flight then
            groups, again = itertools.tee(_groups(alike, size))
            asks = ([Ask(self._ids(q), q.seed) for q in group] for group in groups)
            made = self.engine.sample(asks, decoding)
            for question, (one,) in itertools.chain.from_iterable(map(_paired, again, made)):
                text, read = tokens.text_of(self.tokenizer, one.ids, self.ends), self._ids(question)
                why = "" if text else "said nothing"
                reply = Reply(text, why, len(read), len(one.ids))
                self.keep(question, reply)
                yield reply

    def lost(self, question: Question) -> int:
        return max(len(self._ids(question)) + question.max_tokens - self.context, 0)

    def _ids(self, question: Question) -> list[int]:
        """Token ids of a question, as the model's chat template has it."""
        if not getattr(self.tokenizer, "chat_template", None):
            return tokens.text_ids(self.tokenizer, question.text)
        turns = [{"role": "user", "content": question.text}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))


def _paired(
    group: list[Question], made: list[list[tokens.Generation]]
) -> list[tuple[Question, list[tokens.Generation]]]:
    return list(zip(group, made, strict=True))


def _groups(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    while group := list(itertools.islice(questions, size)):
        yield group

"""judge: a language model rates the answers to a prompt, and says in words what it thinks of them.

Facts of METHOD (feedback in words of a language model): the forms of LMU and LMC.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from alt_hpc.domains import Domain
from alt_hpc.errors import InputError, blaming
from alt_hpc.judges import AnyJudge, Asker, Judge, Question, answers, fitted, rate
from alt_hpc.rewards.reward import Answers, File, Found, Given, Named, Reward, Scored, Scorer
from alt_hpc.settings import GIVES_KIND, Count, digest

TRIES = 5  # the first at temperature 0, the others at 0.7, each with a seed of its own
TOKENS = {"lmu": 400, "lmc": 10}  # of a reply; of LMC as METHOD has it
TOGETHER = 16  # prompts, about whose answers a judge is asked together


class Settings(Reward):
    """One question an answer. A reply that cannot be read is asked for again, four times at most.

    Then the answer is set aside and counted. What an answer gets depends on prompt and text alone.
    """

    model_config = GIVES_KIND

    kind: Literal["judge"] = "judge"
    judge: AnyJudge
    form: Literal["lmu", "lmc"] = "lmu"
    """lmu: a sentence of feedback and a score from 0 to 3; lmc: one of `categories`."""
    categories: Annotated[list[str], Field(min_length=2)] = Field([*rate.HARMLESS])
    """For lmc, best first: the reward of the last is 0. Other ones need a prompt of their own."""
    prompt: str | None = None
    """A file with {post} and {answer}, which says how to reply; default: our own of the form."""
    max_tokens: Count | None = None
    """Of a reply; default: 400 for lmu, 10 for lmc."""

    @property
    def rates(self) -> int:
        return rate.BEST_SCORE + 1 if self.form == "lmu" else len(self.categories)

    @property
    def writes(self) -> bool:
        return self.form == "lmu"

    def named(self) -> dict[str, Named]:
        return {f"judge.{key}": Named(*one) for key, one in self.asked.named().items()}

    def files(self) -> dict[str, str]:
        return {"prompt": self.prompt} if self.prompt else {}

    def check_keys(self) -> None:
        with blaming(".judge"):
            self.asked.check_keys()
        if self.form == "lmu" and "categories" in self.model_fields_set:
            raise InputError("only of form: lmc", ".categories")
        if self.form == "lmc" and (*self.categories,) != rate.HARMLESS and not self.prompt:
            raise InputError("our own prompt has other categories: give yours", ".prompt")
        if len({name.casefold() for name in self.categories}) < len(self.categories):
            raise InputError("the categories must differ from one another", ".categories")

    def check(self, found: Found) -> None:
        self.template(found.file)
        with blaming(".judge"):
            self.asked.check(lambda key: found.place(f"judge.{key}"))

    def load(self, given: Given) -> Scorer:
        assert given.asker is not None, "only a stage that keeps replies asks a judge"
        asker = given.asker("judge", self.asked)
        read = rate.written if self.form == "lmu" else rate.picked(self.categories)
        template = self.template(given.file)
        return Judged(asker, given.domain, template, read, self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """Of a reply."""
        return self.max_tokens or TOKENS[self.form]

    @property
    def asked(self) -> Judge:
        """The judge itself."""
        judge: Judge = self.judge
        return judge

    def template(self, file: Callable[[str], File]) -> str:
        """What the judge is asked; InputError where the file is none, or lacks a placeholder."""
        if self.prompt is None:
            return rate.WRITTEN if self.form == "lmu" else rate.PICKED
        with blaming(".prompt"):
            template = file("prompt").text(self.prompt)
            rate.check(template)
        return template


@dataclass(frozen=True)
class Judged:
    """A judge, loaded: the scorer of kind `judge`."""

    asker: Asker
    domain: Domain
    template: str
    read: rate.Reads
    max_tokens: int

    def score(self, groups: Iterable[Answers]) -> Iterator[Scored]:
        some = iter(groups)
        while together := list(itertools.islice(some, TOGETHER)):
            yield from self._scored(together)

    def _scored(self, groups: list[Answers]) -> Iterator[Scored]:
        asked = [self._question(group.prompt, text) for group in groups for text in group.texts]
        found = iter(answers(self.asker, [one for one, _ in asked], self.read, TRIES))
        lost = (shortened for _, shortened in asked)
        for group in groups:
            its = list(itertools.islice(found, len(group.texts)))
            rewards = [
                float("nan") if one.value is None else float(one.value.rating) for one in its
            ]
            words = [None if one.value is None else one.value.words for one in its]
            shortened = any([*itertools.islice(lost, len(its))])
            yield Scored(rewards, {}, words, [len(one.replies) for one in its], shortened)

    def _question(self, prompt: str, text: str) -> tuple[Question, bool]:
        """About an answer; whether the post has lost its end."""
        seed = int(digest([prompt, text])[:15], 16)

        def make(post: str) -> Question:
            return Question(rate.filled(self.template, post, text), seed, self.max_tokens)

        return fitted(self.asker, self.domain.judged(prompt), make)

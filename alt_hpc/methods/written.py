"""written: ALT-LMU. A judge writes feedback on each answer, and scores it (arXiv 2407.16970).

An answer is trained on behind the judge's own sentence on it. The policy is asked with an exemplar:
a sentence that the judge wrote on an answer of the best score, or of the worst as control.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from alt_hpc.errors import InputError
from alt_hpc.graph import SCORE
from alt_hpc.methods.method import NOTHING, Asking, Known, Label, Row
from alt_hpc.methods.rated import Rated
from alt_hpc.settings import GIVES_KIND, LARGEST
from alt_hpc.settings import Settings as Section

# A letter that nobody writes: tokenizers have no better name for it than its four bytes.
_RARE = "\U0010fffd"


class Exemplars(Section):
    """Sentences of one's own to ask with; of several, one is drawn for each prompt."""

    best: Annotated[list[str], Field(min_length=1)]
    worst: Annotated[list[str], Field(min_length=1)]


class Settings(Rated):
    """`feedback: {feedback} input: {prompt}`; two answers of each score from 3 to 0.

    The policy after an iteration is asked with what the judge wrote in that iteration, drawn anew
    for each prompt; where no answer had the best score, of the nearest that one had.
    """

    model_config = GIVES_KIND
    defaults: ClassVar[Mapping[str, Any]] = {
        "domain.template": "feedback: {feedback} input: {prompt}"
    }
    reads_words: ClassVar[bool] = True

    kind: Literal["written"] = "written"
    exemplars: Exemplars | None = None
    """What to ask with, the same in all iterations; default: drawn from what the judge wrote."""
    longest: Annotated[int, Field(ge=16, le=LARGEST)] = 160
    """Bytes of the judge's sentence that are kept, whole words; prompts leave room for them."""

    def check(self) -> None:
        super().check()
        own = self.exemplars
        for side, texts in {"best": own.best, "worst": own.worst}.items() if own else ():
            for i, text in enumerate(texts):
                if not text.strip():
                    raise InputError("the exemplar is empty", f"method.exemplars.{side}[{i}]")

    @property
    def title(self) -> str:
        return "ALT-LMU"

    @property
    def levels(self) -> list[str]:
        """What the scores are called; the words are the judge's."""
        return [f"score {score}" for score in reversed(range(self.quantiles))]

    @property
    def widest(self) -> list[str]:
        own = self.exemplars
        return [_RARE * (self.longest // 4), *([*own.best, *own.worst] if own else [])]

    @property
    def taught(self) -> int:
        """Each answer has a sentence of its own."""
        return super().taught * self.per_quantile

    @property
    def family(self) -> int:
        return 1

    def start(self, iteration: int) -> Any:
        """All of it: what it asks with is drawn from its exemplars."""
        return self

    def asked(self, iteration: int) -> tuple[Asking, ...]:
        """Nothing has been written yet of what the starting policy answers."""
        return super().asked(iteration) if iteration or self.exemplars else ("plain",)

    def between(self, iteration: int) -> tuple[Asking, ...]:
        return () if self.exemplars else super().between(iteration)

    def sources(self, iteration: int) -> tuple[str, ...]:
        return (SCORE,) if iteration and not self.exemplars else ()

    def recall(self, rows: Iterable[Row]) -> Known:
        if self.exemplars:
            return {0: self.exemplars.best, self.quantiles - 1: self.exemplars.worst}
        found: dict[int, list[str]] = {}
        for label in self.labels(rows):
            for quantile, text in zip(label.quantiles, label.feedback, strict=True):
                if quantile is not None and text is not None:
                    found.setdefault(quantile, []).append(text)
        return found

    def ask(self, how: Asking, row: Row, known: Known = NOTHING, seed: int = 0) -> str | None:
        """InputError where the judge wrote nothing at all."""
        quantile = self.asks_for(how)
        if quantile is None:
            return None
        if not known:
            problem = "no answer of the iteration was rated: there is no exemplar to ask with"
            raise InputError(problem, "method.exemplars")
        texts = known[min(known, key=lambda q: (abs(q - quantile), q))]
        drawn = np.random.default_rng([seed, quantile]).integers(len(texts))
        return texts[int(drawn)]

    def called(self, how: Asking) -> str | None:
        quantile = self.asks_for(how)
        return None if quantile is None else self.levels[quantile]

    def _labelled(self, rows: Sequence[Row]) -> list[Label]:
        labels = super()._labelled(rows)
        both = zip(labels, rows, strict=True)
        return [self._in_words(label, row.get("written") or ()) for label, row in both]

    def _in_words(self, label: Label, written: Sequence[str | None]) -> Label:
        """A label with the judge's sentences; InputError where the reward writes none."""
        if len(written) != len(label.quantiles):
            raise InputError("the reward writes no feedback", "method.kind")
        texts = [_kept(text, self.longest) if text else None for text in written]
        found = zip(label.quantiles, texts, strict=True)
        quantiles = [quantile if text else None for quantile, text in found]
        counted = [None if q is None else text for q, text in zip(quantiles, texts, strict=True)]
        return Label(quantiles, counted)


def _kept(text: str, most: int) -> str:
    """Whole words of a sentence, at most so many bytes; a first word that is longer loses its end.

    White space of any kind is one space.
    """
    words = " ".join(text.split())
    if len(words.encode()) <= most:
        return words
    head = words.encode()[: most + 1].decode(errors="ignore")
    return head.rpartition(" ")[0] or words.encode()[:most].decode(errors="ignore")

"""words: ALT-RM. Rewards are put in order, each quantile has a word (arXiv 2407.16970)."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import Asking, Label, Method, Row
from alt_hpc.settings import LARGEST, Count, Natural


class Settings(Method):
    """The words, best first, and how generations come into their quantiles."""

    kind: Literal["words"] = "words"
    quantiles: Annotated[int, Field(ge=2, le=LARGEST)] = 5
    texts: list[str] = Field(["Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."])
    remainder: Literal["spread", "last"] = "spread"
    """Where the remainder of n / quantiles goes; "last": the authors' code."""
    pool: Literal["prompt", "iteration"] = "prompt"
    """What is put in order together; "iteration": the original Quark."""
    per_quantile: Count = 2
    """Generations kept of each quantile for training."""
    only_finished: bool = False
    """Generations that ran into the limit get no quantile: words are not about coming to an end."""
    trained: list[Natural] | None = None
    """Quantiles (0: the best) whose generations are trained on; default: all."""
    append_eos: bool = False
    """As the authors: train on the text, tokenised again, with an EOS (see `learned`)."""

    def check(self) -> None:
        if len(self.texts) != self.quantiles:
            problem = f"{len(self.texts)} feedback texts for {self.quantiles} quantiles"
            raise InputError(problem, "method.texts")
        if len(set(self.texts)) != len(self.texts):
            raise InputError("the feedback texts must differ from one another", "method.texts")
        for i, text in enumerate(self.texts):
            if not text.strip():
                raise InputError("the feedback text is empty", f"method.texts[{i}]")
        if self.trained is not None and not set(self.trained) <= {*range(self.quantiles)}:
            raise InputError(f"there are quantiles 0 to {self.quantiles - 1}", "method.trained")
        if self.trained is not None and not 0 < len(set(self.trained)) == len(self.trained):
            raise InputError("name one or several quantiles, each once", "method.trained")

    @property
    def title(self) -> str:
        return "ALT-RM"

    @property
    def levels(self) -> list[str]:
        return self.texts

    @property
    def taught(self) -> int:
        return len(self.texts if self.trained is None else self.trained)

    @property
    def family(self) -> int:
        return self.per_quantile

    def ask(self, how: Asking, row: Row, earlier: Sequence[Row] = ()) -> str | None:
        return {"plain": None, "best": self.texts[0], "worst": self.texts[-1]}[how]

    def label(self, row: Row) -> Label | None:
        return None if self.pool == "iteration" else next(self._labels([row]))

    def labels(self, rows: Iterable[Row]) -> Iterator[Label]:
        return super().labels(rows) if self.pool == "prompt" else self._labels(rows)

    def _labels(self, rows: Iterable[Row]) -> Iterator[Label]:
        """Of prompts whose generations are put in order together."""
        pool = []
        for row in rows:
            counts = row["finished"] if self.only_finished else [True] * len(row["rewards"])
            both = zip(row["rewards"], counts, strict=True)
            pool.append([r if r is not None and good else math.nan for r, good in both])
        together = list(itertools.chain(*pool))
        found = iter(paper.quantiles(together, self.quantiles, self.remainder))
        for rewards in pool:
            mine = list(itertools.islice(found, len(rewards)))
            yield Label(mine, [None if q is None else self.texts[q] for q in mine])

    def select(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        wanted = range(self.quantiles) if self.trained is None else self.trained
        found = [quantile if quantile in wanted else None for quantile in label.quantiles]
        return paper.select(found, finished, self.per_quantile, rng)

    def learned(self, generation: Row, tokenizer: Tokenizer, limit: int) -> list[int]:
        """The sampled ids; with `append_eos` what the authors train on (METHOD of their code).

        That is ` ` + the stripped text, tokenised again, and an EOS, but where the text does not
        end in `.`, `?` or `!` and has exactly `limit` tokens: then it has lost its end.
        """
        if not self.append_eos:
            return super().learned(generation, tokenizer, limit)
        text = str(generation["text"]).strip()
        ids: list[int] = tokenizer.encode(" " + text, add_special_tokens=False)
        whole = text.endswith((".", "?", "!")) or len(ids) != limit
        end: Any = tokenizer.eos_token_id
        return [*ids, end] if whole else ids

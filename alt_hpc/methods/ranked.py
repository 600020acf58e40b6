"""What methods share that put rewards in order: quantiles, their pool, what is trained on."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from alt_hpc.errors import InputError
from alt_hpc.lm.tokens import Tokenizer
from alt_hpc.methods import quantiles as paper
from alt_hpc.methods.method import NOTHING, QUANTILE, Asking, Choice, Known, Label, Method, Row
from alt_hpc.settings import LARGEST, Count, Natural


class Ranked(Method):
    """How generations come into their quantiles, and how many of each are trained on."""

    quantiles: Annotated[int, Field(ge=2, le=LARGEST)] = 5
    remainder: Literal["spread", "last"] = "spread"
    """Where the remainder of n / quantiles goes; "last": the authors' code."""
    pool: Literal["prompt", "iteration"] = "prompt"
    """What is put in order together; "iteration": all prompts, as the original Quark."""
    history: Natural = 0
    """Earlier iterations that join the pool: their draws are put in order and trained on again."""
    per_quantile: Count = 2
    """Generations kept of each quantile for training."""
    only_finished: bool = False
    """Generations that ran into the limit get no quantile: words are not about coming to an end."""
    trained: list[Natural] | None = None
    """Quantiles (0: the best) whose generations are trained on; default: all."""
    append_eos: bool = False
    """As the authors: train on the text, tokenised again, with an EOS (see `learned`)."""

    def check(self) -> None:
        if self.trained is not None and not set(self.trained) <= {*range(self.quantiles)}:
            raise InputError(f"there are quantiles 0 to {self.quantiles - 1}", "method.trained")
        if self.trained is not None and not 0 < len(set(self.trained)) == len(self.trained):
            raise InputError("name one or several quantiles, each once", "method.trained")

    @property
    def trained_on(self) -> Sequence[int]:
        """The quantiles whose generations are trained on."""
        return range(self.quantiles) if self.trained is None else self.trained

    @property
    def taught(self) -> int:
        return len(self.trained_on)

    @property
    def family(self) -> int:
        return self.per_quantile

    def pooled(self, iteration: int) -> range:
        return range(max(1, iteration - self.history), iteration + 1)

    def start(self, iteration: int) -> Any:
        """Its tokens, the feedback that prompts leave room for, and with which it is asked."""
        how = self.asked(0) if iteration == 0 else ()
        asked = {one: self.ask(one, {}) for one in how}
        knows = iteration == 0 and {"best", "worst"} <= {*self.asked(1)}  # then answers are drawn
        return [self.adds_tokens, self.widest, asked, knows]

    def asks_for(self, how: Asking) -> int | None:
        """The quantile that is asked for; None: plain."""
        named = {"plain": None, "best": 0, "worst": self.quantiles - 1}
        return named[how] if how in named else int(how.removeprefix(QUANTILE))

    def ask(self, how: Asking, row: Row, known: Known = NOTHING, seed: int = 0) -> str | None:
        quantile = self.asks_for(how)
        return None if quantile is None else self.levels[quantile]

    @property
    def _apart(self) -> bool:
        """Whether each draw is put in order by itself."""
        return self.pool == "prompt" and not self.history

    def label(self, row: Row) -> Label | None:
        return self._labelled([row])[0] if self._apart else None

    def together(self, row: Row) -> Any:
        if self.pool == "iteration":
            return None
        return row["post"] if self.history else row["row"]

    def labels(self, rows: Iterable[Row]) -> Iterator[Label]:
        """All draws of a frozen prompt are put in order together, or all of the pool."""
        if self._apart:
            yield from super().labels(rows)
            return
        scored = list(rows)
        groups: dict[Any, list[int]] = {}
        for i, row in enumerate(scored):
            groups.setdefault(self.together(row), []).append(i)
        found: dict[int, Label] = {}
        for group in groups.values():
            found |= zip(group, self._labelled([scored[i] for i in group]), strict=True)
        yield from (found[i] for i in range(len(scored)))

    def _labelled(self, rows: Sequence[Row]) -> list[Label]:
        """Labels of rows whose generations are put in order together."""
        rewards = list[float]()
        for row in rows:
            counts = row["finished"] if self.only_finished else [True] * len(row["rewards"])
            both = zip(row["rewards"], counts, strict=True)
            rewards += [math.nan if r is None or not good else r for r, good in both]
        found = iter(self.placed(rewards))
        mine = [list(itertools.islice(found, len(row["rewards"]))) for row in rows]
        return [Label(qs, [None if q is None else self.levels[q] for q in qs]) for qs in mine]

    def placed(self, rewards: Sequence[float]) -> list[int | None]:
        """Quantiles of rewards that are put in order together; None: set aside."""
        return paper.quantiles(rewards, self.quantiles, self.remainder)

    def select(
        self, label: Label, finished: Sequence[bool], rng: np.random.Generator
    ) -> list[Choice]:
        made, before = list[Choice](), Counter[int]()
        for i in self.kept(label, finished, rng):
            quantile = label.quantiles[i] or 0
            turn, before[quantile] = before[quantile] // self.family, before[quantile] + 1
            made.append(Choice(i, label.feedback[i], quantile + self.quantiles * turn))
        return made

    def kept(self, label: Label, finished: Sequence[bool], rng: np.random.Generator) -> list[int]:
        """Indices of `per_quantile` generations of each quantile that is trained on."""
        return paper.select(self.wanted(label), finished, self.per_quantile, rng)

    def wanted(self, label: Label) -> list[int | None]:
        """A label's quantiles, None also where they are not trained on."""
        trained = self.trained_on
        return [quantile if quantile in trained else None for quantile in label.quantiles]

    def learned(self, generation: Row, tokenizer: Tokenizer, limit: int) -> list[int]:
        """The sampled ids; with `append_eos` what the authors train on.

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

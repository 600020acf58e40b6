"""total: a weighted sum of other rewards."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from alt_hpc.errors import InputError
from alt_hpc.rewards.reward import Answers, Given, Named, Reward, Scored, Scorer
from alt_hpc.settings import GIVES_KIND, Number, key

if TYPE_CHECKING:
    from alt_hpc.rewards.reward import Reward as AnyReward

_TAKEN = ("error",)  # a report has a `reward_error`


class Settings(Reward):
    """An answer's reward is the sum of its parts, each times its weight."""

    model_config = GIVES_KIND

    kind: Literal["total"] = "total"
    parts: "dict[str, AnyReward]"
    """Rewards of any kind, by names of your own."""
    weights: dict[str, Number] = key({}, "Of the parts, by name; one that is not named has 1.")

    @property
    def trained(self) -> bool:
        return bool(self.to_train())

    def singles(self) -> dict[str, Reward]:
        each = {f".parts.{name}": part.singles() for name, part in self.parts.items()}
        return {at + inner: one for at, its in each.items() for inner, one in its.items()}

    def weight(self, part: str) -> float:
        return self.weights.get(part, 1.0)

    def named(self) -> dict[str, Named]:
        of = {f"parts.{name}": part.named() for name, part in self.parts.items()}
        return {f"{at}.{inner}": one for at, its in of.items() for inner, one in its.items()}

    def files(self) -> dict[str, str]:
        of = {f"parts.{name}": part.files() for name, part in self.parts.items()}
        return {f"{at}.{inner}": one for at, its in of.items() for inner, one in its.items()}

    def check_keys(self) -> None:
        if not self.parts:
            raise InputError("give one reward or several, by names of your own", ".parts")
        for name, part in self.parts.items():
            if name in _TAKEN or not name.isidentifier():
                problem = f"'{name}' cannot be a name here: give another word"
                raise InputError(problem, f".parts.{name}")
            try:
                part.check_keys()
            except InputError as error:
                raise InputError(error.problem, f".parts.{name}{error.field}") from None
        for name in self.weights:
            if name not in self.parts:
                problem = f"no part is called '{name}' (there are: {', '.join(self.parts)})"
                raise InputError(problem, f".weights.{name}")

    def load(self, given: Given) -> Scorer:
        loaded = {n: part.load(given.within(f"parts.{n}")) for n, part in self.parts.items()}
        return Total(loaded, {name: self.weight(name) for name in self.parts})


@dataclass(frozen=True)
class Total:
    """Rewards, loaded, and their weights by the same names: the scorer of kind `total`."""

    parts: Mapping[str, Scorer]
    weights: Mapping[str, float]

    def score(self, groups: Iterable[Answers]) -> Iterator[Scored]:
        copies = itertools.tee(groups, len(self.parts))  # a part may take some ahead
        each = [part.score(its) for part, its in zip(self.parts.values(), copies, strict=True)]
        for scored in zip(*each, strict=True):
            parts = {name: one.rewards for name, one in zip(self.parts, scored, strict=True)}
            rewards = [self._sum(values) for values in zip(*parts.values(), strict=True)]
            written = next((one.feedback for one in scored if one.feedback is not None), None)
            shortened = any(one.shortened for one in scored)
            tries = next((one.tries for one in scored if one.tries is not None), None)
            yield Scored(rewards, parts, written, tries, shortened)

    def _sum(self, values: Sequence[float]) -> float:
        """The sum for one answer, in float64; NaN where a part or the sum is not finite."""
        counted = [w * v for w, v in zip(self.weights.values(), values, strict=True)]
        try:
            finite = all(map(math.isfinite, [*values, *counted]))
            return math.fsum(counted) if finite else math.nan
        except OverflowError:
            return math.nan

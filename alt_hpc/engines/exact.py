"""exact: our own decoding on a transformers model; the same answers whatever the sharding."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alt_hpc.engines.engine import Ask, Decoding, Engine, Model

if TYPE_CHECKING:
    from alt_hpc.lm.decode import Generation

# lm.decode imports torch: it is imported where a policy is loaded.


class Settings(Engine):
    """It has nothing to set."""

    kind: Literal["exact"] = "exact"

    def check(self, place: Path) -> None:
        from alt_hpc.lm import check

        check.decodable(place)

    def load(self, model: Model, decoding: Decoding) -> "Generator":
        return Generator(model, decoding)


class Generator:
    """A policy, prompt group by prompt group."""

    def __init__(self, model: Model, decoding: Decoding) -> None:
        from alt_hpc.lm import load

        self.policy = load.policy(model.place, model.dtype, model.device)
        self.how = dataclasses.asdict(decoding) | {"eos": model.ends}  # as `generate` calls it
        self.together, self.answers = self.how.pop("group"), self.how.pop("answers")

    def sample(self, groups: Iterable[Sequence[Ask]]) -> "Iterator[list[list[Generation]]]":
        from alt_hpc.lm.decode import generate

        for group in groups:
            ids, seeds = [ask.ids for ask in group], [ask.seed for ask in group]
            yield generate(self.policy, ids, self.answers, seeds, **self.how)

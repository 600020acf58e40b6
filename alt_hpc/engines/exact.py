"""exact: our own decoding on a transformers model; the same answers whatever the sharding."""

from pathlib import Path
from typing import Literal

from alt_hpc.engines.engine import Decoding, Engine, Generations, Generator, Groups, Model

# lm.check, decode and load import torch: they are imported where a policy is at hand.


class Settings(Engine):
    """It has nothing to set."""

    kind: Literal["exact"] = "exact"

    def check(self, place: Path) -> None:
        from alt_hpc.lm import check

        check.decodable(place)

    def load(self, model: Model) -> Generator:
        from alt_hpc.lm import decode, load

        policy = load.policy(model.place, model.dtype, model.device)

        def sample(groups: Groups, decoding: Decoding) -> Generations:
            how = decoding._asdict() | {"eos": model.ends}  # as `generate` calls it
            answers, _ = how.pop("answers"), how.pop("group")
            for group in groups:
                ids, seeds = [ask.ids for ask in group], [ask.seed for ask in group]
                yield decode.generate(policy, ids, answers, seeds, **how)

        return Generator(True, sample)

"""Rewards: where the signal comes from. A kind is one file.

`REWARDS` is the table of them; a module's `Settings` is the reward.
"""

from types import ModuleType

from alt_hpc.rewards import function, judge, model, total
from alt_hpc.rewards.reward import Answers, File, Found, Given, Named, Reward, Scored, Scorer
from alt_hpc.settings import one_of

REWARDS: dict[str, ModuleType] = {
    "model": model,
    "function": function,
    "judge": judge,
    "total": total,
}

AnyReward = one_of(REWARDS, "model")  # what pydantic reads where a reward stands
total.Settings.model_rebuild(_types_namespace={"AnyReward": AnyReward})

__all__ = [
    "REWARDS",
    "Answers",
    "AnyReward",
    "File",
    "Found",
    "Given",
    "Named",
    "Reward",
    "Scored",
    "Scorer",
]

"""Rewards: where the signal comes from. A kind is one file.

`REWARDS` is the table of them; a module's `Settings` is the reward.
"""

from types import ModuleType

from alt_hpc.rewards import model
from alt_hpc.rewards.reward import Answers, Given, Named, Reward, Scored, Scorer

REWARDS: dict[str, ModuleType] = {"model": model}

__all__ = ["REWARDS", "Answers", "Given", "Named", "Reward", "Scored", "Scorer"]

"""What stages read: policies, the reward model, rows of other pieces; and the device to work on."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alt_hpc import models, pieces
from alt_hpc.runfolder import POLICY, REWARD_MODEL, RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alt_hpc.reward import RewardModel

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def device() -> torch.device:
    """This process's GPU (its local rank among the visible ones), else the CPU.

    Sets threads, and on a CPU how memory is kept.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def keep_freed_memory() -> None:
    """Have the C library keep the large blocks that torch frees on a CPU.

    glibc gives them back to the system at once, and each operation's result then faults its
    pages in anew (see tests/benchmarks/results.md). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cpu() -> torch.device:
    """Where a model that DeepSpeed will place is loaded."""
    return torch.device("cpu")


def policy_folder(folder: RunFolder, iteration: int) -> Path:
    """The checked Hugging Face folder of the policy after an iteration (0: the starting one)."""
    config = folder.config()
    piece = pieces.policy(config, iteration)
    if piece is None:
        assert config.policy.model is not None
        return folder.model(config.policy.model)
    return folder.open_piece(piece)[0] / POLICY


def tokenizer(folder: RunFolder, policy: Path) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, or the one that the config names."""
    named = folder.config().policy.tokenizer
    return models.load_tokenizer(folder.model(named) if named else policy)


def reward_model(folder: RunFolder, on: torch.device) -> RewardModel:
    """The reward model of the run."""
    from alt_hpc import reward

    config = folder.config()
    settings = config.reward_model
    piece = pieces.reward_model(config)
    if piece is None:
        assert settings.model is not None
        place = folder.model(settings.model)
    else:
        place = folder.open_piece(piece)[0] / REWARD_MODEL
    longest = max(config.sampling.max_new_tokens, config.evaluation.max_new_tokens)
    named = [folder.model(n) if n else None for n in (settings.base, settings.tokenizer)]
    return reward.load_reward_model(
        place, settings, on, max_new_tokens=longest, base=named[0], tokenizer=named[1]
    )


def prompt_budget(folder: RunFolder, policy: Path, max_new_tokens: int) -> int:
    """Tokens that a conditioned prompt may have, so that the generation still fits."""
    longest = folder.config().policy.max_length
    context = longest or models.context_length(models.load_config(policy))
    return context - max_new_tokens

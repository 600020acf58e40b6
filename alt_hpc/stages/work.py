"""Work: what a stage is handed to make one piece, and how it reads what that is made from."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alt_hpc import process, ranks
from alt_hpc.graph import STAGES, Piece
from alt_hpc.ranks import Ranks
from alt_hpc.run import attempt, progress, rows
from alt_hpc.run.attempt import Attempt
from alt_hpc.run.files import write_atomically
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import MODEL_FOLDER, POLICY_FOLDER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alt_hpc.config import Config
    from alt_hpc.reward import RewardModel

# torch and transformers are imported where they are used: the tests' stubs need neither.

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Work:
    """One piece to make, in this process.

    Attributes
    ----------
    run, piece
        The run, and the piece of it.
    sources
        Checksums of what the piece is made from.
    ranks
        This process among those that make the piece together.
    """

    def __init__(
        self,
        run: RunFolder,
        piece: Piece,
        sources: dict[str, str],
        ranks: Ranks,
        attempt: Attempt | None,
    ) -> None:
        self.run = run
        self.piece = piece
        self.sources = sources
        self.ranks = ranks
        self._attempt = attempt

    @classmethod
    def begin(cls, run: RunFolder, piece: Piece, number: int) -> Work:
        """Begin an attempt, once its sources are whole; of many ranks the first one does.

        Raises
        ------
        PieceDamaged
            A source is not whole.
        """
        sources = run.manifests.checksums(run.graph().sources(piece))
        me = ranks.from_environment()
        mine = attempt.begin(run, piece, number, sources) if me.first else None
        return cls(run, piece, sources, me, mine)

    def connect(self) -> None:
        """Join the ranks that make this piece together, ready for DeepSpeed.

        Raises
        ------
        TimeoutError
            Another rank did not come.
        """
        meeting = self.run.layout.meeting(self.piece, process.start())
        meeting.parent.mkdir(parents=True, exist_ok=True)
        ranks.connect(meeting, self.ranks, write_atomically)

    @property
    def config(self) -> Config:
        """The config as last submitted."""
        return self.run.config()

    @property
    def attempt(self) -> Attempt:
        """What is written in, by the first rank alone."""
        assert self._attempt is not None
        return self._attempt

    @cached_property
    def device(self) -> torch.device:
        """This process's GPU, else the CPU. Sets threads, and on a CPU how memory is kept."""
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if self.ranks.device.type == "cpu":
            keep_freed_memory()
        return self.ranks.device

    @property
    def rows(self) -> range:
        """The rows of this shard: of the draw, or of the held-out prompts."""
        return range(*(self.run.graph().rows(self.piece) or (0, 0)))

    def mates(self) -> Iterator[dict[str, Any]]:
        """Rows of the shard that this one pairs with, its checksum verified first."""
        stage = STAGES[self.piece.stage].pairs
        assert stage is not None
        return rows.of_piece(self.run, Piece(self.piece.iteration, stage, self.piece.shard))

    def show(self, done: int, total: int, unit: str, started: float) -> None:
        """Say how far the piece is: `done` of `total` units since `started` (seconds, epoch)."""
        progress.show(self.run, self.piece, done, total, unit, started)

    def say(self, words: str) -> None:
        """A line in the task's log."""
        print(f"{self.piece}: {words}", flush=True)

    def policy(self, iteration: int) -> Policy:
        """The policy after an iteration (0: the starting one), every checksum verified."""
        from alt_hpc import models

        piece = self.run.graph().policy(iteration)
        if piece is None:
            assert self.config.policy.model is not None
            place = self.run.model(self.config.policy.model)
        else:
            place = self.run.manifests.open(piece)[0] / POLICY_FOLDER
        tokenizer = self.tokenizer(place)
        shape = models.load_config(place)
        ends = models.eos_ids(shape, tokenizer)
        context = self.config.policy.max_length or models.context_length(shape)
        return Policy(place, tokenizer, ends, context)

    def tokenizer(self, place: Path) -> PreTrainedTokenizerBase:
        """The tokenizer of a policy's folder, or the one that the config names."""
        from alt_hpc import models

        named = self.config.policy.tokenizer
        return models.load_tokenizer(self.run.model(named) if named else place)


@dataclass(frozen=True)
class Policy:
    """A policy on disk with what reads and writes its text.

    Attributes
    ----------
    place
        Its Hugging Face folder.
    ends
        Token ids that end a generation.
    context
        Tokens that a prompt and its generation may have together.
    """

    place: Path
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    context: int

    def load(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """The model, in evaluation mode."""
        from alt_hpc import models

        return models.load_policy(self.place, dtype, device)

    def fit(self, prefix: str, prompt: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Token ids of a conditioned prompt, so that the generation still fits.

        And how much of its post was lost (see `models.fit_prompt`).
        """
        from alt_hpc import models

        return models.fit_prompt(self.tokenizer, prefix, prompt, self.context - max_new_tokens)

    def text(self, ids: list[int]) -> str:
        """The text of generated ids, without the ends."""
        from alt_hpc import models

        return models.text_of(self.tokenizer, ids, self.ends)


def load_reward_model(run: RunFolder, on: torch.device) -> RewardModel:
    """The reward model of a run."""
    from alt_hpc import reward

    config = run.config()
    settings = config.reward_model
    piece = run.graph().reward_model()
    if piece is None:
        assert settings.model is not None
        place = run.model(settings.model)
    else:
        place = run.manifests.open(piece)[0] / MODEL_FOLDER
    longest = max(config.sampling.max_new_tokens, config.evaluation.max_new_tokens)
    named = [run.model(n) if n else None for n in (settings.base, settings.tokenizer)]
    return reward.load_reward_model(
        place, settings, on, max_new_tokens=longest, base=named[0], tokenizer=named[1]
    )


def cpu() -> torch.device:
    """Where a model that DeepSpeed will place is loaded."""
    import torch

    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Have the C library keep the large blocks that torch frees on a CPU.

    glibc gives them back to the system at once, and each operation's result then faults its
    pages in anew (see tests/benchmarks/results.md). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

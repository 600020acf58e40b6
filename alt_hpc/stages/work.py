"""Work: what a stage is handed to make one piece, and how it reads what that is made from."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alt_hpc.engines import Decoding, Generator, Model
from alt_hpc.graph import STAGES, Piece, Shard
from alt_hpc.rewards import Given, Reward, Scorer
from alt_hpc.run import attempt, models, progress, rows
from alt_hpc.run.attempt import Attempt
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import MODEL_FOLDER, POLICY_FOLDER
from alt_hpc.training import ranks
from alt_hpc.training.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alt_hpc.config import Config

# torch and transformers are imported where they are used: the tests' stubs need neither.


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
        """Join the ranks that make this piece together, ready for DeepSpeed."""
        ranks.connect(self.ranks)

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
        """This process's GPU, else the CPU. Sets threads."""
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
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

    def shard(self) -> Shard:
        """What a piece of evaluation is made for."""
        shard = self.run.graph().shard(self.piece)
        assert shard is not None
        return shard

    def policy(self, iteration: int) -> Policy:
        """The policy after an iteration (0: the starting one), every checksum verified."""
        piece = self.run.graph().policy(iteration)
        if piece is None:
            assert self.config.policy.model is not None
            place = models.place(self.run, self.config.policy.model)
            return self._policy(place, self.config.policy.tokenizer)
        return self._policy(self.run.manifests.open(piece)[0] / POLICY_FOLDER, None)

    def base(self) -> Policy:
        """What `sft` starts from."""
        assert self.config.policy.base is not None
        place = models.place(self.run, self.config.policy.base)
        return self._policy(place, self.config.policy.tokenizer)

    def external(self, name: str) -> Policy:
        """A policy of `evaluate.policies`."""
        about = self.config.evaluate.policies[name]
        return self._policy(models.place(self.run, about.model), about.tokenizer)

    def _policy(self, place: Path, named: str | None) -> Policy:
        """A policy, with the tokenizer that the config names where its folder may have none."""
        from alt_hpc.lm import load, tokens

        home = models.place(self.run, named, whole=False) if named else place
        tokenizer = load.tokenizer(home)
        most = self.config.policy.max_length
        context = tokens.context_length(load.config(place), unknown=most)
        context = min(context, most or context)
        return Policy(place, self.config, tokenizer, tokens.all_ends(place, tokenizer), context)

    def generator(self, policy: Policy, decoding: Decoding) -> Generator:
        """The engine that the config names, with the policy loaded, once per task."""
        model = Model(
            policy.place, self.config.policy.dtype, policy.ends, policy.context, self.device
        )
        return _generator(self.run, model, decoding)


@functools.lru_cache(maxsize=1)  # a task may make several shards
def _generator(run: RunFolder, model: Model, decoding: Decoding) -> Generator:
    return run.config().engine.load(model, decoding)


def scorer(run: RunFolder, reward: Reward, on: torch.device, made: Path | None = None) -> Scorer:
    """A reward of a run, loaded; `made` is the model that the run trains, else what it made."""
    config, named = run.config(), reward.named()
    piece = run.graph().reward_model() if reward.trained else None
    if piece is not None and made is None:
        made = run.manifests.open(piece)[0] / MODEL_FOLDER
    given = Given(
        place=lambda key: models.place(run, named[key].name, whole=named[key].whole),
        made=made,
        domain=config.domain,
        new_tokens=config.sample.max_new_tokens,
        device=on,
    )
    return reward.load(given)


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
    config: Config
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    context: int

    def load(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """The model, in evaluation mode."""
        from alt_hpc.lm import load

        return load.policy(self.place, dtype, device)

    def fit(self, feedback: str | None, prompt: str, new_tokens: int) -> tuple[list[int], int]:
        """Token ids of a prompt asked with feedback, so that `new_tokens` still fit.

        And how much of the prompt was lost (see `Domain.conditioned`).
        """
        domain, widest = self.config.domain, self.config.method.widest
        room = self.context - new_tokens
        return domain.conditioned(self.tokenizer, feedback, prompt, room, widest)

    def text(self, ids: list[int]) -> str:
        """The text of generated ids, without the ends."""
        from alt_hpc.lm import tokens

        return tokens.text_of(self.tokenizer, ids, self.ends)


def cpu() -> torch.device:
    """Where a model that DeepSpeed will place is loaded."""
    import torch

    return torch.device("cpu")

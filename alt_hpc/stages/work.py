"""Work: what a stage is handed to make one piece, and how it reads what that is made from."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alt_hpc.config import Config
from alt_hpc.engines import Decoding, Engine, Generator, Model
from alt_hpc.graph import SCORE, STAGES, Piece
from alt_hpc.judges import Asker, Judge
from alt_hpc.judges import Given as JudgeGiven
from alt_hpc.lm import tokens
from alt_hpc.methods import Known, Label
from alt_hpc.rewards import File, Given, Reward, Scorer
from alt_hpc.run import attempt, code, models, rows
from alt_hpc.run.asked import Ledger, Replies
from alt_hpc.run.folder import RunFolder
from alt_hpc.run.layout import MODEL_FOLDER, POLICY_FOLDER, REPLIES_FILE
from alt_hpc.training import ranks

if TYPE_CHECKING:
    import torch

# torch and transformers are imported where they are used: the tests' stubs need neither.


@dataclass(frozen=True)
class Policy:
    """A policy on disk with what reads and writes its text."""

    place: Path  # its Hugging Face folder
    config: Config
    tokenizer: tokens.Tokenizer
    ends: tuple[int, ...]  # token ids that end a generation
    context: int  # tokens that a prompt and its generation may have together
    vocabulary: int  # rows of its embeddings
    lacks_tokens: bool = False  # whether its folder's tokenizer lacks those of the method

    def fit(self, feedback: str | None, prompt: str, new_tokens: int) -> tuple[list[int], int]:
        """Token ids of a prompt asked with feedback, so that `new_tokens` still fit, and how much
        of the prompt was lost (see `Domain.conditioned`).
        """
        room, widest = self.context - new_tokens, self.config.method.widest
        return self.config.domain.conditioned(self.tokenizer, feedback, prompt, room, widest)

    def text(self, ids: list[int]) -> str:
        """The text of generated ids, without the ends."""
        return tokens.text_of(self.tokenizer, ids, self.ends)


class Work:
    """A piece of a run to make in this process, by the attempt of a number.

    `config` is the one last submitted, `sources` are the checksums of what the piece is made from,
    `ranks` says which this process is among those that make it together, and `attempt` is what the
    first of them, alone, writes in.
    """

    def __init__(self, run: RunFolder, piece: Piece, number: int) -> None:
        """Begin the attempt; PieceDamaged where a source is not whole."""
        self.run, self.piece, self.config = run, piece, run.config()
        self.sources = {str(s): run.manifests.wait(s).checksum for s in run.graph().sources(piece)}
        self.ranks = ranks.from_environment()
        if self.ranks.first:
            self.attempt = attempt.begin(run, piece, number, self.sources)

    def connect(self) -> None:
        """Join the ranks that make this piece together, ready for DeepSpeed. Sets threads."""
        ranks.connect(self.ranks)
        _ = self.device

    @cached_property
    def device(self) -> "torch.device":
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
        return rows.of_piece(self.run, dataclasses.replace(self.piece, stage=stage))

    def pool(self) -> Iterator[tuple[int, dict[str, Any], Label]]:
        """Scored rows of all draws that this iteration trains on, each with its iteration before
        it and its label behind it, in the order of the draws.
        """
        method = self.config.method
        ks = method.pooled(self.piece.iteration)
        scored = [(k, row) for k in ks for row in rows.of_stage(self.run, k, SCORE)]
        labels = method.labels(row for _, row in scored)
        return ((k, row, label) for (k, row), label in zip(scored, labels, strict=True))

    def recall(self, iteration: int) -> Known:
        """What the policy after an iteration can be asked with, beside the method's own words."""
        method = self.config.method
        each = (rows.of_stage(self.run, iteration, s) for s in method.sources(iteration))
        known = method.recall(itertools.chain.from_iterable(each))
        if known:
            counts = [f"{len(known[q])} of {method.levels[q]}" for q in sorted(known)]
            self.say(f"exemplars to ask with: {', '.join(counts)}")
        return known

    def show(self, done: int, total: int, unit: str, started: float, kept: int = 0) -> None:
        """As `attempt.show`."""
        attempt.show(self.run, self.piece, done, total, unit, started, kept)

    def say(self, words: str) -> None:
        """A line in the task's log."""
        print(f"{self.piece}: {words}", flush=True)

    def policy(self, iteration: int) -> Policy:
        """The policy after an iteration (0: the starting one), every checksum verified."""
        given: tuple[str | Path | None, str | None]
        given = self.config.policy.model, self.config.policy.tokenizer
        if piece := self.run.graph().policy(iteration):
            given = self.run.manifests.open(piece)[0] / POLICY_FOLDER, None
        policy = self.named(*given)
        lacks = self.config.method.extend(policy.tokenizer)  # prompts are shortened alike
        return dataclasses.replace(policy, lacks_tokens=lacks)

    def named(self, model: str | Path | None, tokenizer: str | None) -> Policy:
        """A policy in a folder or that the config names, with a tokenizer that it names beside."""
        from alt_hpc.lm import load

        assert model is not None
        place = model if isinstance(model, Path) else models.place(self.run, model)
        home = models.place(self.run, tokenizer, whole=False) if tokenizer else place
        words, most = load.tokenizer(home), self.config.policy.max_length
        shape, ends = load.config(place), tokens.all_ends(place, words)
        context = tokens.context_length(shape, unknown=most)
        size = shape.get_text_config().vocab_size
        return Policy(place, self.config, words, ends, min(context, most or context), size)

    def generator(self, policy: Policy) -> Generator:
        """The engine that the config names, with the policy loaded, once per task."""
        dtype, ends = self.config.policy.dtype, policy.ends
        model = Model(policy.place, dtype, ends, policy.context, self.device)
        return _generator(self.config.engine, model)

    def asker(self, judge: Judge, at: str) -> Asker:
        """A judge, loaded; `at` is the key where it stands. Its replies are kept with the piece."""
        named, piece = judge.named(), self.piece
        beside = len(self.run.graph().of(piece.iteration, piece.stage))
        tasks = min(beside, self.config.cluster.stage(piece.stage).parallel)
        replies = Replies(judge, self.run.layout.replies(self.piece), self.replies)
        ledger = Ledger(self.run, at, judge.most or 0.0)

        def place(key: str) -> Path:
            name, whole = named[key]
            return models.place(self.run, name, whole=whole)

        kept = replies.known, replies.keep
        given = JudgeGiven(place, lambda: self.device, *kept, ledger, tasks, _generator)
        return judge.load(given)

    def scorer(self, reward: Reward, at: str) -> Scorer:
        """A reward that stands at a key, loaded; the replies of its judge are kept."""

        def asker(key: str, judge: Judge) -> Asker:
            return self.asker(judge, f"{at}.{key}")

        return scorer(self.run, reward, self.device, asker=asker)

    @property
    def replies(self) -> Path:
        """Where this attempt writes down what judges say."""
        return self.attempt.folder / REPLIES_FILE

    def decoding(self, policy: Policy, answers: int, group: int, new: int) -> Decoding:
        """How answers are sampled; none: how the greedy one is found."""
        sample, method = self.config.sample, self.config.method
        silent = tuple(method.silent(policy.tokenizer, policy.vocabulary))
        heat = (sample.temperature, sample.top_p) if answers else (0.0, 1.0)
        return Decoding(answers or 1, *heat, new, group, silent)

    def seed(self, *numbers: int) -> int:
        """A function of the run's seed, the iteration and these numbers alone."""
        of = np.random.SeedSequence([self.config.seed, self.piece.iteration, *numbers])
        return int(of.generate_state(1, np.uint64)[0] >> np.uint64(1))


@functools.lru_cache(maxsize=1)  # a task may make several shards
def _generator(engine: Engine, model: Model) -> Generator:
    return engine.load(model)


def unload() -> None:
    """Let go of the model that an engine holds: another one needs the memory."""
    _generator.cache_clear()


def scorer(
    run: RunFolder,
    reward: Reward,
    on: "torch.device",
    made: Path | None = None,
    asker: Callable[[str, Judge], Asker] | None = None,
) -> Scorer:
    """A reward of a run, loaded; `made` is the model that the run trains, else what it made.

    `asker` gives the judge at a key of the reward's, where it has one.
    """
    piece = run.graph().reward_model() if reward.trained else None
    if piece and made is None:
        made = run.manifests.open(piece)[0] / MODEL_FOLDER
    named, files, config = reward.named(), reward.files(), run.config()

    def place(key: str) -> Path:
        return models.place(run, named[key].name, whole=named[key].whole)

    def file(key: str) -> File:
        return code.user_file(run, files[key])

    new = config.sample.max_new_tokens
    return reward.load(Given(place, file, config.domain, new, made, on, asker))


def finite(rewards: Sequence[float]) -> list[float | None]:
    """Rewards as rows have them: None where one is not finite."""
    return [reward if math.isfinite(reward) else None for reward in rewards]

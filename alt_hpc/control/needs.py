"""What a task of each stage holds of memory, moment by moment, as a config has it.

Nothing is loaded: sizes come from headers of weight files, lengths of texts from what was noted
when they were frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alt_hpc import process
from alt_hpc.config import Config
from alt_hpc.data import texts
from alt_hpc.engines import Engine
from alt_hpc.errors import InputError
from alt_hpc.graph import EVALUATE, JUDGE, MEASURE, REWARD_MODEL, SAMPLE, SCORE, SFT, TRAIN
from alt_hpc.judges import Judge
from alt_hpc.judges import model as judge_model
from alt_hpc.lm import fetch, memory, sizes
from alt_hpc.lm.memory import Held, Moment
from alt_hpc.lm.sizes import Sizes
from alt_hpc.rewards import Reward
from alt_hpc.rewards import judge as rated
from alt_hpc.rewards import model as reward_model
from alt_hpc.run import models, rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.training.memory import Task
from alt_hpc.training.settings import ZERO2, Training

A_TOKEN = 3  # bytes of text, or more: a text has a third of its bytes as tokens, or fewer


@dataclass(frozen=True)
class Needs:
    """What the tasks of a run hold, moment by moment."""

    config: Config
    run: RunFolder

    def of(self, stage: str) -> list[Moment]:
        """The moments of a task; none where no model is loaded. InputError where not known."""
        by: dict[str, Callable[[], list[Moment]]] = {
            SFT: self._sft,
            REWARD_MODEL: self._reward_model,
            SAMPLE: self._sample,
            SCORE: lambda: self._reward(self.config.reward, self.config.sample.generations),
            TRAIN: self._train,
            EVALUATE: self._evaluate,
            MEASURE: self._measure,
            JUDGE: lambda: self._judge(self.config.judge.judge if self.config.judge else None),
        }
        return by[stage]() if stage in by else []

    def on_gpu(self, stage: str) -> bool:
        cluster = self.config.cluster
        here = cluster.backend == "local" and process.has_gpu()
        return bool(cluster.stage(stage).gpus) or here

    @cached_property
    def policy(self) -> Sizes:
        policy = self.config.policy
        return self._sizes(policy.model or policy.base or "")

    def _sizes(self, name: str) -> Sizes:
        known = models.known(self.run)
        place = known.get(models.key(name)) or fetch.here(name)
        if place is None:
            raise InputError(f"{name} is not on this machine yet (alt-hpc fetch gets it)")
        return sizes.of(place)

    # ------------------------------------------------------------------ how long texts are

    def _longest(self, *columns: str) -> int:
        """Tokens of the longest frozen text of these columns; 0 where none is frozen."""
        names = [one.name for one in texts.wanted(self.config)]
        found = [rows.longest(self.run, name) for name in names]
        return max((its.get(c, 0) for its in found for c in columns), default=0) // A_TOKEN

    def prompt(self, new: int) -> int:
        """Tokens of the longest prompt with its feedback, beside `new` of an answer."""
        most = self.config.policy.max_length
        room = min(filter(None, (most, self.policy.context)), default=most or 2048) - new
        words = max((len(text.encode()) for text in self.config.method.widest), default=0)
        asked = self._longest("prompt")
        return max(1, min(room, asked + words // A_TOKEN) if asked else room)

    @property
    def longest_told(self) -> int:
        try:
            return self.prompt(0)
        except InputError:
            return self._longest("prompt")

    # ------------------------------------------------------------------ stages that answer, read

    def _sample(self) -> list[Moment]:
        sample = self.config.sample
        group = min(sample.group, sample.prompts)
        return self._answers(SAMPLE, group, sample.generations, sample.max_new_tokens)

    def _evaluate(self) -> list[Moment]:
        config, evaluate = self.config, self.config.evaluate
        drawn, new = evaluate.drawn, config.evaluated_tokens
        sets = [evaluate.prompts, *(one.prompts for one in evaluate.sets.values())]  # None: all
        sets += [evaluate.test_prompts] if evaluate.test_prompts else []
        group = min(evaluate.group, max(posts or evaluate.group for posts in sets))
        between = len(config.method.between(1)) if evaluate.every_word else 0
        ways = max(len(config.method.asked(k)) for k in (0, 1)) + between
        greedy = self._answers(EVALUATE, group * ways, 1, new)
        if not drawn.posts:
            return greedy
        start = self._answers(EVALUATE, min(group, drawn.posts), drawn.answers, new)
        return greedy + start

    def _answers(self, stage: str, prompts: int, answers: int, new: int) -> list[Moment]:
        _check_engine(self.config.engine)
        its, dtype, on_gpu = self.policy, self.config.policy.dtype, self.on_gpu(stage)
        prompt = self.prompt(new)
        made = memory.answering(its, dtype, prompts, answers, prompt, new, on_gpu)
        return [memory.loading(its, dtype), made]

    def _measure(self) -> list[Moment]:
        config, new, dtype = self.config, self.config.evaluated_tokens, self.config.policy.dtype
        found = list[Moment]()
        for reward in (config.measured_by, *config.measure.further.values()):
            found += self._reward(reward, 4, MEASURE)
        budget, on_gpu = memory.READ, self.on_gpu(MEASURE)
        read = memory.reading(self.policy, dtype, self.prompt(new), new, budget, on_gpu, True)
        return [*found, memory.loading(self.policy, dtype), read]

    def _reward(self, reward: Reward, answers: int, stage: str = SCORE) -> list[Moment]:
        """All that a reward is made of is loaded at once."""
        found, all_ = list[Moment](), Moment()
        for one in reward.singles().values():
            if isinstance(one, rated.Settings):
                found += self._judge(one.asked, stage)
            if isinstance(one, reward_model.Settings):
                its = self._sizes(one.model or one.base or "")
                found.append(all_ + memory.loading(its, one.dtype))
                all_ += self._reads(one, its, answers, stage)
        return [*found, all_] if found else []

    def _reads(self, one: reward_model.Settings, its: Sizes, answers: int, stage: str) -> Moment:
        new, on_gpu = self.config.sample.max_new_tokens, self.on_gpu(stage)
        prompt = min(one.max_length - new, self._longest("prompt") or one.max_length)
        budget = min(reward_model.AT_ONCE["cuda" if on_gpu else "cpu"], answers * new)
        return memory.reading(its, one.dtype, prompt, new, budget, on_gpu, False)

    def _judge(self, judge: Judge | None, stage: str = JUDGE) -> list[Moment]:
        """A judge within the task; one behind an endpoint takes no memory here."""
        if not isinstance(judge, judge_model.Settings):
            return []
        _check_engine(judge.engine)
        its = self._sizes(judge.model)
        most = min(filter(None, (judge.max_length, its.context)), default=2048)
        asked = (judge.group, 1, most, 0, self.on_gpu(stage))
        made = memory.answering(its, judge.dtype, *asked)
        return [memory.loading(its, judge.dtype), made]

    # ------------------------------------------------------------------ stages that train

    def _task(self, stage: str, model: Sizes, settings: Training, **about: Any) -> Task:
        its = self.config.cluster.stage(stage)
        zero = self._deepspeed(settings).get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise InputError(f"{settings.deepspeed}: 'zero_optimization' must be an object")
        world = its.nodes * its.tasks_per_node
        about["rows"] = max(1, min(about["rows"], settings.global_batch // world))
        return Task(model, settings, zero, world, self.on_gpu(stage), **about)

    def _deepspeed(self, settings: Training) -> dict[str, Any]:
        """The DeepSpeed JSON of a training, as the run has frozen it, or as it is here."""
        if self.run.exists():
            return dict(self.run.facts()["deepspeed"][settings.deepspeed or ""])
        if settings.deepspeed is None:
            return ZERO2
        return fetch.read_json(Path(settings.deepspeed))

    def _sft(self) -> list[Moment]:
        settings = self.config.sft
        assert settings is not None
        label = self._longest("label") or settings.max_length // 2
        width = min(settings.max_length, (self._longest("prompt") or settings.max_length) + label)
        learned, count = min(label, settings.max_length // 2), settings.micro_batch
        about = {"rows": count, "width": width, "learned": count * learned}
        return self._task(SFT, self.policy, settings, **about).moments()

    def _train(self) -> list[Moment]:
        config, settings = self.config, self.config.train
        new, size = config.sample.max_new_tokens, 1
        if config.shares_prompts:
            size = config.family
            batches = ("global_batch", "micro_batch")
            fewer = {key: max(1, getattr(settings, key) // size) for key in batches}
            settings = settings.model_copy(update=fewer)
        learned, count, reference = size * new, settings.micro_batch, 0
        if settings.kl:
            shared = 0 if settings.trains_embeddings else self._shared(settings)
            reference = self.policy.weights - shared
        about = {"rows": count, "width": self.prompt(new) + learned, "learned": count * learned}
        return self._task(TRAIN, self.policy, settings, **about, reference=reference).moments()

    def _shared(self, settings: Training) -> int:
        """Weights of the blocks that a reference has from the policy (`training/reference`)."""
        blocks = self.policy.blocks
        return sum(blocks[: len(blocks) - self.policy.top(settings.trained_blocks)])

    def _reward_model(self) -> list[Moment]:
        settings = self.config.reward_model
        (one,) = self.config.reward.to_train().values()
        assert settings is not None
        assert isinstance(one, reward_model.Settings)
        its = self._sizes(one.base or "")
        answer = self._longest("chosen", "rejected") or one.max_length // 2
        width = min(one.max_length, (self._longest("prompt") or one.max_length) + answer)
        held_out = self._reads(one, its, 2, REWARD_MODEL)
        if not settings.head_only:
            about = {"rows": 2 * settings.micro_batch, "width": width, "learned": 0}
            return [*self._task(REWARD_MODEL, its, settings, **about).moments(), held_out]
        whole = Moment(host=Held(weights=8 * its.weights))  # loaded in float32; checked on disk
        return [memory.loading(its, one.dtype), held_out, whole]


def _check_engine(engine: Engine) -> None:
    """Raise InputError where the model does not decide what an engine takes."""
    if engine.fills_memory:
        raise InputError(f"engine.kind: {engine.kind} takes most of its GPU, whatever the model")

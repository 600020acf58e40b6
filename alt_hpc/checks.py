"""What can be found wrong with models before anything is queued is asked of them here.

Every weight is there and finite, every tokenizer too; and what engines, rewards and training would
refuse in their jobs is asked of a model without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alt_hpc.config import Config, rules
from alt_hpc.errors import InputError, blaming
from alt_hpc.rewards import Reward
from alt_hpc.run import models as frozen
from alt_hpc.run.folder import RunFolder
from alt_hpc.training.settings import Training

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# torch and transformers are imported where models are read: a run that exists has none to read.


@dataclass(frozen=True)
class _Wanted:
    """A model that a config names."""

    field: str
    name: str
    whole: bool = True

    @property
    def key(self) -> str:
        return frozen.key(self.name, whole=self.whole)


def models(config: Config, run: RunFolder | None = None) -> dict[str, Path]:
    """Folders of all models that the config names and the run does not know, each checked.

    Downloaded where needed. Those that the run knows must have the bytes that they had.

    Raises
    ------
    InputError
        A model that is nowhere, broken, changed, or not to be used for what it is named for.
    """
    known = frozen.known(run) if run is not None else {}
    found = dict(known)
    for one in _wanted(config):
        with blaming(one.field):
            if one.key not in found:
                found[one.key] = _fetched(one)
            elif run is not None and one.key in known:
                frozen.place(run, one.name, whole=one.whole)
                _tell_if_moved(one, known[one.key])
    fresh = {key: place for key, place in found.items() if key not in known}
    if fresh:
        _check(config, found, fresh)
    return fresh


def _wanted(config: Config) -> Iterator[_Wanted]:
    """All models that a config names, whole ones first."""
    policy = config.policy
    start = policy.model or policy.base
    assert start is not None
    yield _Wanted(_start(config), start)
    rewards = {"reward": config.reward}
    if config.measure.reward is not None:
        rewards["measure.reward"] = config.measure.reward
    for section, reward in rewards.items():
        for key, named in reward.named().items():
            yield _Wanted(f"{section}.{key}", named.name, named.whole)
    for name, external in config.evaluate.policies.items():
        field = f"evaluate.policies.{name}"
        yield _Wanted(f"{field}.model", external.model)
        if external.tokenizer:
            yield _Wanted(f"{field}.tokenizer", external.tokenizer, whole=False)
    if policy.tokenizer:
        yield _Wanted("policy.tokenizer", policy.tokenizer, whole=False)


def _start(config: Config) -> str:
    """The key that names the policy which the run begins with."""
    return "policy.model" if config.policy.model else "policy.base"


def _fetched(one: _Wanted) -> Path:
    from alt_hpc import models as lm

    return (lm.fetch(one.name) if one.whole else lm.fetch_light(one.name)).absolute()


def _tell_if_moved(one: _Wanted, place: Path) -> None:
    """Say that the hub has another version by now; the run goes on with its own."""
    began, now = frozen.revision(place), frozen.newest(place)
    if now and now != began:
        print(
            f"{one.field}: {one.name} has moved on to {now[:12]}; the run goes on with"
            f" {began[:12]}, which it began with",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------- what jobs would refuse


def _check(config: Config, found: Mapping[str, Path], fresh: Mapping[str, Path]) -> None:
    start = config.policy.model or config.policy.base or ""
    if start in fresh:
        _check_policy(config, found)
    sections: dict[str, Reward] = {"reward": config.reward}
    if config.measure.reward is not None:
        sections["measure.reward"] = config.measure.reward
    for section, reward in sections.items():
        keys = {k: frozen.key(n.name, whole=n.whole) for k, n in reward.named().items()}
        if fresh.keys() & set(keys.values()):
            with blaming(section):
                places = {key: found[name] for key, name in keys.items()}
                reward.check(places.__getitem__, config.domain, config.sample.max_new_tokens)
            if reward.trained and config.reward_model and not config.reward_model.head_only:
                with blaming("reward.base"):
                    _check_blocks(places["base"], config.reward_model)
    for name, external in config.evaluate.policies.items():
        if external.model in fresh:
            with blaming(f"evaluate.policies.{name}.model"):
                _check_external(config, name, found)


def _check_policy(config: Config, found: Mapping[str, Path]) -> None:
    from alt_hpc import generate
    from alt_hpc import models as lm

    policy, field = config.policy, _start(config)
    place = found[policy.model or policy.base or ""]
    with blaming(field):
        lm.check_weights(place)
    shape = lm.load_config(place)
    _check_context(config, shape)
    with blaming("policy.tokenizer" if policy.tokenizer else field):
        named = policy.tokenizer and found[frozen.key(policy.tokenizer, whole=False)]
        tokenizer = lm.load_tokenizer(named or place)
    with blaming(field):
        _check_ends(place, tokenizer)
        config.engine.check(place)
        generate.check(place)  # `measure` reads answers with it, whatever the engine
        _check_training(config, shape)
    _check_feedback(config, shape, tokenizer)


def _check_external(config: Config, name: str, found: Mapping[str, Path]) -> None:
    from alt_hpc import models as lm

    external = config.evaluate.policies[name]
    place = found[external.model]
    lm.check_weights(place)
    named = external.tokenizer and found[frozen.key(external.tokenizer, whole=False)]
    tokenizer = lm.load_tokenizer(named or place)
    _check_ends(place, tokenizer)
    config.engine.check(place)
    context = lm.context_length(lm.load_config(place), unknown=config.policy.max_length)
    taken = len(lm.text_ids(tokenizer, external.ask.removesuffix("{prompt}")))
    if taken + config.evaluated_tokens >= context:
        raise InputError(f"{place}: no room for a prompt: it reads {context} tokens")


def _check_ends(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from alt_hpc import models as lm

    if not lm.all_ends(place, tokenizer):
        raise InputError(f"{place}: neither model nor tokenizer names a token that ends a text")


def _check_context(config: Config, shape: PretrainedConfig) -> None:
    """What the policy is to read and write fits into its context."""
    from alt_hpc import models as lm

    asked = config.policy.max_length
    context = lm.context_length(shape, unknown=asked)
    if asked is not None and asked > context:
        raise InputError(f"{asked}, but the model reads {context} tokens", "policy.max_length")
    new = {"sample.max_new_tokens": config.sample.max_new_tokens}
    for field, tokens in new.items():
        if tokens >= context:
            raise InputError(f"no room for a prompt: the model reads {context} tokens", field)


def _check_feedback(
    config: Config, shape: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Feedback leaves room for a prompt behind it."""
    from alt_hpc import models as lm

    context = config.policy.max_length or lm.context_length(shape)
    room = context - config.sample.max_new_tokens
    for feedback in config.method.widest:
        taken = len(lm.text_ids(tokenizer, config.domain.before(feedback)))
        if taken >= room:
            raise InputError(
                f"no room for a prompt behind {feedback!r}: it takes {taken} of {room} tokens"
                " (policy.max_length without sample.max_new_tokens)",
                "method",
            )


def _check_training(config: Config, shape: PretrainedConfig) -> None:
    """What training would refuse of the architecture."""
    from transformers import AutoModelForCausalLM

    from alt_hpc import losses, trainer
    from alt_hpc import models as lm

    model = lm.empty(shape, AutoModelForCausalLM)
    losses.check(model)
    for section in rules.trainings():
        settings: Any = getattr(config, section)
        if settings is not None and section != "reward_model":
            trainer.freeze(model, settings.trained_blocks, settings.trains_embeddings)


def _check_blocks(place: Path, settings: Training) -> None:
    """Stop where the blocks of a model that become a reward model's cannot be found."""
    from transformers import AutoModelForSequenceClassification

    from alt_hpc import models as lm
    from alt_hpc import trainer

    model = lm.empty(lm.load_config(place), AutoModelForSequenceClassification)
    trainer.freeze(model, settings.trained_blocks, settings.trains_embeddings)


def deepspeed(config: Config, settings: Mapping[str, dict[str, object]]) -> None:
    """Refuse now what the trainer would refuse of a DeepSpeed JSON in its job."""
    from alt_hpc import trainer

    for name in rules.trainings():
        training = getattr(config, name)
        if training is not None and training.deepspeed is not None:
            try:
                trainer.check_deepspeed_config(settings[training.deepspeed])
            except InputError as error:
                raise InputError(f"{training.deepspeed}: {error}", f"{name}.deepspeed") from error

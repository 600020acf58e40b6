"""What jobs would refuse of models and DeepSpeed JSONs is refused here, before anything is queued.

Every weight is there and finite, every tokenizer too; and what engines, rewards and training would
refuse in their jobs is asked of a model without memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from alt_hpc.config import Config, rules
from alt_hpc.control import named
from alt_hpc.errors import InputError, blaming
from alt_hpc.lm import check, load, tokens
from alt_hpc.lm.blocks import train_top
from alt_hpc.run.models import key
from alt_hpc.training import deepspeed as checking
from alt_hpc.training import losses
from alt_hpc.training.settings import Training

Places = Mapping[str, Path]  # of models, by what they stand under


def models(config: Config, found: Places, fresh: Places) -> None:
    """Raise InputError where a fresh model cannot be used for what the config names it for."""
    if (config.policy.model or config.policy.base) in fresh:
        _check_policy(config, found)
    for section, reward in named.rewards(config).items():
        keys = {k: key(one.name, whole=one.whole) for k, one in reward.named().items()}
        if not fresh.keys() & set(keys.values()):
            continue
        places = {k: found[name] for k, name in keys.items()}
        with blaming(section):
            reward.check(places.__getitem__, config.domain, config.sample.max_new_tokens)
        if reward.trained and config.reward_model and not config.reward_model.head_only:
            with blaming("reward.base"):
                shape = load.config(places["base"])
                _check_trained(shape, AutoModelForSequenceClassification, config.reward_model)
    for name, external in config.evaluate.policies.items():
        if external.model in fresh:
            with blaming(f"evaluate.policies.{name}.model"):
                _check_external(config, name, found)


def _check_policy(config: Config, found: Places) -> None:
    policy, field = config.policy, named.start(config)
    place = found[policy.model or policy.base or ""]
    with blaming(field):
        check.weights(place)
    shape = load.config(place)
    _check_context(config, shape)
    with blaming("policy.tokenizer" if policy.tokenizer else field):
        home = found[key(policy.tokenizer, whole=False)] if policy.tokenizer else place
        tokenizer = load.tokenizer(home)
    with blaming(field):
        _check_ends(place, tokenizer)
        config.engine.check(place)
        check.decodable(place)  # `measure` reads answers with it, whatever the engine
        losses.check(load.empty(shape, AutoModelForCausalLM))
        for section in rules.trainings():
            settings: Any = getattr(config, section)
            if settings is not None and section != "reward_model":
                _check_trained(shape, AutoModelForCausalLM, settings)
    _check_feedback(config, shape, tokenizer)


def _check_external(config: Config, name: str, found: Places) -> None:
    external = config.evaluate.policies[name]
    place = found[external.model]
    check.weights(place)
    home = found[key(external.tokenizer, whole=False)] if external.tokenizer else place
    tokenizer = load.tokenizer(home)
    _check_ends(place, tokenizer)
    config.engine.check(place)
    context = tokens.context_length(load.config(place), unknown=config.policy.max_length)
    taken = len(tokens.text_ids(tokenizer, external.ask.removesuffix("{prompt}")))
    if taken + config.evaluated_tokens >= context:
        raise InputError(f"{place}: no room for a prompt: it reads {context} tokens")


def _check_ends(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokens.all_ends(place, tokenizer):
        raise InputError(f"{place}: neither model nor tokenizer names a token that ends a text")


def _check_context(config: Config, shape: PretrainedConfig) -> None:
    """What the policy is given and writes fits into its context."""
    asked, new = config.policy.max_length, config.sample.max_new_tokens
    context = tokens.context_length(shape, unknown=asked)
    if asked is not None and asked > context:
        raise InputError(f"{asked}, but the model reads {context} tokens", "policy.max_length")
    if new >= context:
        problem = f"no room for a prompt: the model reads {context} tokens"
        raise InputError(problem, "sample.max_new_tokens")


def _check_feedback(
    config: Config, shape: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Feedback leaves room for a prompt behind it."""
    context = config.policy.max_length or tokens.context_length(shape)
    room = context - config.sample.max_new_tokens
    for feedback in config.method.widest:
        taken = len(tokens.text_ids(tokenizer, config.domain.before(feedback)))
        if taken >= room:
            raise InputError(
                f"no room for a prompt behind {feedback!r}: it takes {taken} of {room} tokens"
                " (policy.max_length without sample.max_new_tokens)",
                "method",
            )


def _check_trained(shape: PretrainedConfig, auto: Any, settings: Training) -> None:
    """The blocks that are to be trained can be found."""
    train_top(load.empty(shape, auto), settings.trained_blocks, settings.trains_embeddings)


def deepspeed(config: Config, given: Mapping[str, dict[str, object]]) -> None:
    """Raise InputError where training would refuse a DeepSpeed JSON; `given` by their paths."""
    for name in rules.trainings():
        training = getattr(config, name)
        if training is not None and training.deepspeed is not None:
            with blaming(f"{name}.deepspeed"):
                try:
                    checking.check(given[training.deepspeed])
                except InputError as error:
                    raise InputError(f"{training.deepspeed}: {error}") from error

"""What jobs would refuse of models is refused here, before anything is queued.

Every weight is there and finite, every tokenizer too; and what engines, rewards and training would
refuse in their jobs is asked of a model without memory.
"""

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
                place = found[external.model]
                tokenizer = _check_answers(config, place, found, external.tokenizer, "")
                context = tokens.context_length(load.config(place), config.policy.max_length)
                taken = len(tokens.text_ids(tokenizer, external.ask.removesuffix("{prompt}")))
                if taken + config.evaluated_tokens >= context:
                    raise InputError(f"{place}: no room for a prompt: it reads {context} tokens")


def _check_policy(config: Config, found: Places) -> None:
    """What the policy is given and writes fits into its context, and it can be trained."""
    policy, new = config.policy, config.sample.max_new_tokens
    place = found[policy.model or policy.base or ""]
    with blaming(named.start(config)):
        named_by = "policy.tokenizer" if policy.tokenizer else ""
        tokenizer = _check_answers(config, place, found, policy.tokenizer, named_by)
        check.decodable(place)  # `measure` reads answers with it, whatever the engine
        shape = load.config(place)
        losses.check(load.empty(shape, AutoModelForCausalLM))
        for section in rules.trainings():
            settings: Training | None = getattr(config, section)
            if settings is not None and section != "reward_model":
                _check_trained(shape, AutoModelForCausalLM, settings)
    context = tokens.context_length(shape, policy.max_length)
    if policy.max_length is not None and policy.max_length > context:
        problem = f"{policy.max_length}, but the model reads {context} tokens"
        raise InputError(problem, "policy.max_length")
    if new >= context:
        problem = f"no room for a prompt: the model reads {context} tokens"
        raise InputError(problem, "sample.max_new_tokens")
    room = (policy.max_length or context) - new
    for feedback in config.method.widest:
        taken = len(tokens.text_ids(tokenizer, config.domain.before(feedback)))
        if taken >= room:
            raise InputError(
                f"no room for a prompt behind {feedback!r}: it takes {taken} of {room} tokens"
                " (policy.max_length without sample.max_new_tokens)",
                "method",
            )


def _check_answers(
    config: Config, place: Path, found: Places, tokenizer: str | None, field: str
) -> PreTrainedTokenizerBase:
    """A model that writes answers: its weights, engine and tokenizer; returns that.

    `tokenizer` is a name that stands in the config's `field`, where it has not its own.
    """
    check.weights(place)
    with blaming(field):
        loaded = load.tokenizer(found[key(tokenizer, whole=False)] if tokenizer else place)
    if not tokens.all_ends(place, loaded):
        raise InputError(f"{place}: neither model nor tokenizer names a token that ends a text")
    config.engine.check(place)
    return loaded


def _check_trained(shape: PretrainedConfig, auto: Any, settings: Training) -> None:
    """The blocks that are to be trained can be found."""
    train_top(load.empty(shape, auto), settings.trained_blocks, settings.trains_embeddings)

"""The models that a config names: found, still what they were, and of use for what they are for.

What jobs would refuse of a model that is new to a run is refused here, before anything is queued:
every weight is there and finite, every tokenizer too; and what engines, rewards and training would
refuse is asked of a model without memory. A run that exists has no use for torch.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alt_hpc.config import Config, External, rules
from alt_hpc.domains.domain import around
from alt_hpc.errors import InputError, blaming
from alt_hpc.graph import JUDGE, TRAININGS
from alt_hpc.lm import tokens
from alt_hpc.rewards import Found, Named, Reward
from alt_hpc.run import code, models
from alt_hpc.run.folder import RunFolder
from alt_hpc.settings import LARGEST

_TOKEN = re.compile(r"<\|\w+\|>|_QUANTILE_TOKEN_\d+_")  # what is written like one token


def places(config: Config, run: RunFolder | None = None) -> dict[str, Path]:
    """Folders of all models that the config names and the run does not know, each checked.

    Downloaded where needed. Those that the run knows must have the bytes that they had. InputError
    where a model is nowhere, broken, changed, or not to be used for what it is named for.
    """
    known = models.known(run) if run else {}
    fresh: dict[str, Path] = {}
    for field, one in named(config):
        key = models.key(one.name, whole=one.whole)
        with blaming(field):
            if run and key in known:
                place = models.place(run, one.name, whole=one.whole)
                began, now = models.revision(place), models.newest(place)
                if now and now != began:
                    words = f"has moved on to {now[:12]}; the run goes on with {began[:12]}"
                    print(f"{field}: {one.name} {words}, which it began with", file=sys.stderr)
            elif key not in fresh:
                from alt_hpc.lm.fetch import fetch

                fresh[key] = fetch(one.name, whole=one.whole).absolute()
    if fresh:
        _check(config, known | fresh, fresh)
    _check_rewards(config, run, known | fresh, fresh)
    _check_judge(config, known | fresh, fresh)
    return fresh


def named(config: Config) -> Iterator[tuple[str, Named]]:
    """All models behind the fields that name them; the starting policy first, then whole ones."""
    policy = config.policy
    yield (
        "policy.model" if policy.model else "policy.base",
        Named(policy.model or policy.base or ""),
    )
    for section, reward in _rewards(config):
        for key, one in reward.named().items():
            yield f"{section}.{key}", one
    for key, (name, whole) in config.judge.judge.named().items() if config.judge else ():
        yield f"{JUDGE}.judge.{key}", Named(name, whole)
    for name, external in _external(config):
        yield f"evaluate.policies.{name}.model", Named(external.model)
        if external.tokenizer:
            yield f"evaluate.policies.{name}.tokenizer", Named(external.tokenizer, whole=False)
    if policy.tokenizer:
        yield "policy.tokenizer", Named(policy.tokenizer, whole=False)


def files(config: Config) -> dict[str, str]:
    """All files of the user's own, by the fields that name them."""
    rewards = _rewards(config)
    own = {f"{JUDGE}.prompt": config.judge.prompt} if config.judge and config.judge.prompt else {}
    return own | {f"{section}.{key}": f for section, r in rewards for key, f in r.files().items()}


def _rewards(config: Config) -> list[tuple[str, Reward]]:
    """All rewards, or what they are made of, behind the sections where they stand."""
    found = [(section, reward.singles()) for section, reward in rules.rewards(config)]
    return [(section + at, single) for section, its in found for at, single in its.items()]


def _external(config: Config) -> list[tuple[str, External]]:
    """The policies that the run did not make, by their names."""
    every = config.evaluate.policies.items()
    return [(name, policy) for name, policy in every if isinstance(policy, External)]


def _check(config: Config, found: dict[str, Path], fresh: dict[str, Path]) -> None:
    """Raise InputError where a fresh policy cannot be used for what the config names it for."""
    from alt_hpc.lm import load

    field, policy = next(named(config))
    if policy.name in fresh:
        _check_policy(config, found, field, found[policy.name])
    for name, external in _external(config):
        if external.model in fresh:
            with blaming(f"evaluate.policies.{name}.model"):
                place = found[external.model]
                tokenizer = _check_answers(config, place, found, external.tokenizer)
                context = tokens.context_length(load.config(place), config.policy.max_length)
                _check_tokens(tokenizer, external.ask, f"evaluate.policies.{name}.ask")
                taken = len(config.domain.fit(tokenizer, "", LARGEST, around(external.ask))[0])
                if taken + config.evaluated_tokens >= context:
                    raise InputError(f"{place}: no room for a prompt: it reads {context} tokens")


def _check_tokens(tokenizer: Any, ask: str, field: str) -> None:
    """Raise InputError where a token that a policy is asked with is plain text to its tokenizer."""
    for token in _TOKEN.findall(ask):
        ids = tokens.continuation_ids(tokenizer, token)
        if len(ids) != 1:
            problem = f"{tokenizer.name_or_path}: its tokenizer has no token {token}"
            raise InputError(f"{problem}, and would make {len(ids)} of it", field)


def _check_rewards(
    config: Config, run: RunFolder | None, found: dict[str, Path], fresh: dict[str, Path]
) -> None:
    """Raise InputError where a reward cannot be used, those apart whose models the run knows."""
    head, new = config.reward_model, config.sample.max_new_tokens
    for section, reward in _rewards(config):
        keys = {k: models.key(one.name, whole=one.whole) for k, one in reward.named().items()}
        if keys and not fresh.keys() & set(keys.values()):
            continue
        its, own = {k: found[key] for k, key in keys.items()}, reward.files()
        kept = {key: code.user_file(run, name) for key, name in own.items()}
        with blaming(section):
            reward.check(Found(its.__getitem__, kept.__getitem__, config.domain, new))
        if reward.trained and head and not head.head_only:
            from transformers import AutoModelForSequenceClassification

            from alt_hpc.lm import blocks, load

            with blaming(f"{section}.base"):
                shape = load.config(its["base"])
                empty = load.empty(shape, AutoModelForSequenceClassification)
                blocks.train_top(empty, head.trained_blocks, head.trains_embeddings)


def _check_judge(config: Config, found: dict[str, Path], fresh: dict[str, Path]) -> None:
    """Raise InputError where the judge's model cannot be asked, unless the run knows it."""
    named = config.judge.judge.named() if config.judge else {}
    its = {key: models.key(name, whole=whole) for key, (name, whole) in named.items()}
    if config.judge and fresh.keys() & set(its.values()):
        with blaming(f"{JUDGE}.judge"):
            config.judge.judge.check(lambda key: found[its[key]])


def _check_policy(config: Config, found: dict[str, Path], field: str, place: Path) -> None:
    """What the policy is given and writes fits into its context, and it can be trained."""
    from transformers import AutoModelForCausalLM

    from alt_hpc.lm import blocks, check, load
    from alt_hpc.training import losses

    policy, new = config.policy, config.sample.max_new_tokens
    with blaming(field):
        tokenizer = _check_answers(config, place, found, policy.tokenizer, "policy.tokenizer")
        check.decodable(place)  # `measure` reads answers with it, whatever the engine
        shape = load.config(place)
        losses.checked_head(load.empty(shape, AutoModelForCausalLM))
        for section in TRAININGS:
            if section != "reward_model" and (settings := getattr(config, section)):
                empty = load.empty(shape, AutoModelForCausalLM)
                blocks.train_top(empty, settings.trained_blocks, settings.trains_embeddings)
        known, rows = len(tokenizer), shape.get_text_config().vocab_size
        config.method.extend(tokenizer)
        if config.method.adds_tokens and known > rows:
            raise InputError(
                f"{place}: has embeddings for {rows} tokens, its tokenizer has {known}"
            )
    context = tokens.context_length(shape, policy.max_length)
    reads = f"the model reads {context} tokens"
    if (policy.max_length or 0) > context:
        raise InputError(f"{policy.max_length}, but {reads}", "policy.max_length")
    if new >= context:
        raise InputError(f"no room for a prompt: {reads}", "sample.max_new_tokens")
    room = (policy.max_length or context) - new
    for feedback in config.method.widest:
        config.domain.conditioned(tokenizer, feedback, config.domain.probe, LARGEST, [])
        taken = len(config.domain.fit(tokenizer, "", LARGEST, config.domain.around(feedback))[0])
        if taken >= room:
            problem = (
                f"no room for a prompt behind {feedback[:40]!r}: it takes {taken} of {room} tokens"
            )
            without = "(policy.max_length without sample.max_new_tokens)"
            raise InputError(f"{problem} {without}", "method")


def _check_answers(
    config: Config, place: Path, found: dict[str, Path], tokenizer: str | None, field: str = ""
) -> Any:
    """Check a model that writes answers; returns its tokenizer, or the one that `field` names."""
    from alt_hpc.lm import check, load

    check.weights(place)
    with blaming(field if tokenizer else ""):
        loaded = load.tokenizer(found[models.key(tokenizer, whole=False)] if tokenizer else place)
    if not tokens.all_ends(place, loaded):
        raise InputError(f"{place}: neither model nor tokenizer names a token that ends a text")
    config.engine.check(place)
    return loaded

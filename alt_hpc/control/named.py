"""The models that a config names: where they are, got where needed, and still what they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alt_hpc.config import Config
from alt_hpc.errors import blaming
from alt_hpc.rewards import Reward
from alt_hpc.run import models
from alt_hpc.run.folder import RunFolder

# What imports torch is imported where a model is new: a run that exists has none.


@dataclass(frozen=True)
class Named:
    """A model that a config names; not whole: only its configuration and tokenizer are used."""

    field: str
    name: str
    whole: bool = True

    @property
    def key(self) -> str:
        return models.key(self.name, whole=self.whole)


def places(config: Config, run: RunFolder | None = None) -> dict[str, Path]:
    """Folders of all models that the config names and the run does not know, each checked.

    Downloaded where needed. Those that the run knows must have the bytes that they had. InputError
    where a model is nowhere, broken, changed, or not to be used for what it is named for.
    """
    known = models.known(run) if run is not None else {}
    found = dict(known)
    for one in named(config):
        with blaming(one.field):
            if one.key not in found:
                from alt_hpc.lm.fetch import fetch

                found[one.key] = fetch(one.name, whole=one.whole).absolute()
            elif run is not None and one.key in known:
                models.place(run, one.name, whole=one.whole)
                _tell_if_moved(one, known[one.key])
    fresh = {key: place for key, place in found.items() if key not in known}
    if fresh:
        from alt_hpc.control import checks

        checks.models(config, found, fresh)
    return fresh


def named(config: Config) -> Iterator[Named]:
    """All models that a config names, whole ones first."""
    policy = config.policy
    yield Named(start(config), policy.model or policy.base or "")
    for section, reward in rewards(config).items():
        for key, one in reward.named().items():
            yield Named(f"{section}.{key}", one.name, one.whole)
    for name, external in config.evaluate.policies.items():
        field = f"evaluate.policies.{name}"
        yield Named(f"{field}.model", external.model)
        if external.tokenizer:
            yield Named(f"{field}.tokenizer", external.tokenizer, whole=False)
    if policy.tokenizer:
        yield Named("policy.tokenizer", policy.tokenizer, whole=False)


def start(config: Config) -> str:
    """The key that names the policy which the run begins with."""
    return "policy.model" if config.policy.model else "policy.base"


def rewards(config: Config) -> dict[str, Reward]:
    """The rewards of a config, by the sections that they stand in."""
    measured = {"measure.reward": config.measure.reward} if config.measure.reward else {}
    return {"reward": config.reward, **measured}


def _tell_if_moved(one: Named, place: Path) -> None:
    """Say that the hub has another version by now; the run goes on with its own."""
    began, now = models.revision(place), models.newest(place)
    if now and now != began:
        print(
            f"{one.field}: {one.name} has moved on to {now[:12]}; the run goes on with"
            f" {began[:12]}, which it began with",
            file=sys.stderr,
        )

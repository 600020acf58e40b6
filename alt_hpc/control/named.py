"""The models that a config names: where they are, got where needed, and still what they were."""

import sys
from collections.abc import Iterator
from pathlib import Path

from alt_hpc.config import Config
from alt_hpc.errors import blaming
from alt_hpc.rewards import Named, Reward
from alt_hpc.run import models
from alt_hpc.run.folder import RunFolder


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
                models.place(run, one.name, whole=one.whole)
                _tell_if_moved(field, one, known[key])
            elif key not in fresh:
                from alt_hpc.lm.fetch import fetch  # a run that exists has no use for torch

                fresh[key] = fetch(one.name, whole=one.whole).absolute()
    if fresh:
        from alt_hpc.control import checks

        checks.models(config, known | fresh, fresh)
    return fresh


def named(config: Config) -> Iterator[tuple[str, Named]]:
    """All models that a config names, behind the field that names each; whole ones first."""
    policy = config.policy
    yield start(config), Named(policy.model or policy.base or "")
    for section, reward in rewards(config).items():
        for key, one in reward.named().items():
            yield f"{section}.{key}", one
    for name, external in config.evaluate.policies.items():
        field = f"evaluate.policies.{name}"
        yield f"{field}.model", Named(external.model)
        if external.tokenizer:
            yield f"{field}.tokenizer", Named(external.tokenizer, whole=False)
    if policy.tokenizer:
        yield "policy.tokenizer", Named(policy.tokenizer, whole=False)


def start(config: Config) -> str:
    """The key that names the policy which the run begins with."""
    return "policy.model" if config.policy.model else "policy.base"


def rewards(config: Config) -> dict[str, Reward]:
    """The rewards of a config, by the sections that they stand in."""
    measured = {"measure.reward": config.measure.reward} if config.measure.reward else {}
    return {"reward": config.reward, **measured}


def _tell_if_moved(field: str, one: Named, place: Path) -> None:
    """Say that the hub has another version by now; the run goes on with its own."""
    began, now = models.revision(place), models.newest(place)
    if now and now != began:
        words = (
            f"has moved on to {now[:12]}; the run goes on with {began[:12]}, which it began with"
        )
        print(f"{field}: {one.name} {words}", file=sys.stderr)

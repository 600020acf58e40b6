"""Which rows of text a run uses: written into its folder once, before anything is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from alt_hpc.config import Config, HeldOut, Source
from alt_hpc.data import texts
from alt_hpc.errors import InputError
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.settings import digest


@dataclass(frozen=True)
class Wanted:
    """Rows that a run uses: what they are called in its folder, and where they come from."""

    name: str
    source: Source | HeldOut
    split: str  # the key of the source that names it
    columns: tuple[str, ...]
    field: str  # of the config
    limit: int | None = None


def wanted(config: Config) -> Iterator[Wanted]:
    """All rows of text that a config uses."""
    prompts, comparisons = config.data.prompts, config.data.comparisons
    label = ("label",) if config.sft is not None and config.policy.model is None else ()
    one, field = ("prompt",), "data.prompts"
    yield Wanted("prompts-train", prompts, "train", (*one, *label), field, prompts.limit)
    yield Wanted("prompts-valid", prompts, "valid", one, field, prompts.valid_limit)
    if config.evaluate.test_prompts:
        yield Wanted("prompts-test", prompts, "test", one, field)
    if comparisons is not None and config.reward.trained:
        pair, field = ("prompt", "chosen", "rejected"), "data.comparisons"
        limit = {"train": comparisons.limit, "valid": comparisons.valid_limit}
        for split in ("train", "valid"):
            yield Wanted(f"comparisons-{split}", comparisons, split, pair, field, limit[split])
    for name, held_out in config.evaluate.sets.items():
        yield Wanted(
            of_set(config, name),
            held_out,
            "split",
            one,
            f"evaluate.sets.{name}",
            held_out.prompts,
        )


def of_set(config: Config, name: str) -> str:
    """What the rows of a held-out set are called in the run folder.

    A further set bears a digest of its settings: it may be given others later.
    """
    if name in config.evaluate.sets:
        return f"set-{name}-{digest(config.evaluate.sets[name].model_dump())[:8]}"
    return f"prompts-{name}"


def freeze(config: Config, run: RunFolder) -> None:
    """Write the rows that a run uses into its folder, once; to a run that exists, what is new.

    Raises
    ------
    InputError
        Missing file or data set, missing column, a row that is not text, bad JSON (file and line),
        no rows.
    """
    for one in wanted(config):
        if run.exists() and rows.is_frozen(run, one.name):
            continue
        found = texts.read(one.source, one.split, one.columns, one.field)
        examples = map(config.domain.example, found)
        rows.freeze(run, one.name, islice(examples, one.limit))
    count = rows.count(run, "prompts-train")
    if not config.sample.replacement and count < config.sample.prompts:
        raise InputError(
            f"{config.sample.prompts} prompts cannot be drawn without replacement from"
            f" {count} rows",
            "sample.prompts",
        )

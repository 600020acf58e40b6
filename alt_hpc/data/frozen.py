"""Which rows of text a run uses: written into its folder once, before anything is submitted."""

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
    prompts, pairs, field = config.data.prompts, config.data.comparisons, "data.prompts"
    one, pair = ("prompt",), ("prompt", "chosen", "rejected")
    label = ("label",) if config.sft is not None and config.policy.model is None else ()
    yield Wanted("prompts-train", prompts, "train", (*one, *label), field, prompts.limit)
    yield Wanted("prompts-valid", prompts, "valid", one, field, prompts.valid_limit)
    if config.evaluate.test_prompts:
        yield Wanted("prompts-test", prompts, "test", one, field)
    if pairs is not None and config.reward.trained:
        for split, limit in (("train", pairs.limit), ("valid", pairs.valid_limit)):
            yield Wanted(f"comparisons-{split}", pairs, split, pair, "data.comparisons", limit)
    for key, held_out in config.evaluate.sets.items():
        name, field = of_set(config, key), f"evaluate.sets.{key}"
        yield Wanted(name, held_out, "split", one, field, held_out.prompts)


def of_set(config: Config, name: str) -> str:
    """What a set's rows are called in a run; a further set may be given other settings later."""
    if name in config.evaluate.sets:
        return f"set-{name}-{digest(config.evaluate.sets[name].model_dump())[:8]}"
    return f"prompts-{name}"


def freeze(config: Config, run: RunFolder) -> None:
    """Write the rows that a run uses into its folder, once; to a run that exists, what is new.

    InputError, with file and line, where there is none, a column is missing, a row is no text.
    """
    for one in wanted(config):
        if not (run.exists() and rows.is_frozen(run, one.name)):
            found = texts.read(one.source, one.split, one.columns, one.field)
            examples = map(config.domain.example, found)
            rows.freeze(run, one.name, islice(examples, one.limit))
    asked, count = config.sample.prompts, rows.count(run, "prompts-train")
    if not config.sample.replacement and count < asked:
        problem = f"{asked} prompts cannot be drawn without replacement from {count} rows"
        raise InputError(problem, "sample.prompts")

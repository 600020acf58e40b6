"""Which rows of text a run uses: written into its folder once, before anything is submitted."""

from __future__ import annotations

from itertools import islice

from alt_hpc.config import Config
from alt_hpc.data import texts
from alt_hpc.errors import InputError
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder


def freeze(config: Config, run: RunFolder) -> None:
    """Write the rows that a run uses into its folder, once: `prompts-SPLIT`, `comparisons-SPLIT`.

    Raises
    ------
    InputError
        Missing file or data set, missing column, a row that is not text, bad JSON (file and line),
        no rows.
    """
    prompts, comparisons = config.data.prompts, config.data.comparisons
    label = ("label",) if config.sft is not None and config.policy.model is None else ()
    wanted = [("prompts", prompts, "train", ("prompt", *label))]
    wanted.append(("prompts", prompts, "valid", ("prompt",)))
    if config.evaluation.test_prompts:
        wanted.append(("prompts", prompts, "test", ("prompt",)))
    if config.reward_model.model is None and comparisons is not None:
        pair = ("prompt", "chosen", "rejected")
        wanted += [("comparisons", comparisons, split, pair) for split in ("train", "valid")]
    for name, source, split, columns in wanted:
        limit = {"train": source.limit, "valid": source.valid_limit}.get(split)
        found = texts.read(source, split, columns, f"data.{name}")
        rows.freeze(run, f"{name}-{split}", islice(found, limit))
    count = rows.count(run, "prompts-train")
    if not config.sampling.replacement and count < config.sampling.prompts:
        raise InputError(
            f"{config.sampling.prompts} prompts cannot be drawn without replacement from"
            f" {count} rows",
            "sampling.prompts",
        )

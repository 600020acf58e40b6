"""Text rows from a hub data set or local files, checked and frozen; the draws of prompts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from alt_hpc.config import Config, Source
from alt_hpc.errors import InputError
from alt_hpc.pieces import Sharding, cut
from alt_hpc.runfolder import RunFolder

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def freeze(config: Config, folder: RunFolder) -> None:
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
        if prompts.test is None:
            raise InputError(
                "data.prompts.test: name a test split, as evaluation.test_prompts asks"
            )
        wanted.append(("prompts", prompts, "test", ("prompt",)))
    if config.reward_model.model is None and comparisons is not None:
        pair = ("prompt", "chosen", "rejected")
        wanted += [("comparisons", comparisons, split, pair) for split in ("train", "valid")]
    for name, source, split, columns in wanted:
        if folder.has_data(f"{name}-{split}"):
            continue
        limit = source.limit if split == "train" else None
        folder.write_data(f"{name}-{split}", read(source, split, columns, f"data.{name}")[:limit])
    rows = folder.data_facts("prompts-train")["rows"]
    if not config.sampling.replacement and rows < config.sampling.prompts:
        raise InputError(
            f"sampling.prompts: {config.sampling.prompts} prompts cannot be drawn without"
            f" replacement from {rows} rows"
        )


def read(source: Source, split: str, columns: tuple[str, ...], field: str) -> list[dict[str, str]]:
    """All rows of a split with our column names. `field` names the config section in errors."""
    name = getattr(source, split)
    file = local_file(source.path, name, field)
    if file is not None and ".json" in file.name:
        _check_json_lines(file)
    table = _load(source, name, file, field)
    where = str(file or f"{source.path} ({name})")
    theirs = {ours: source.columns.get(ours, ours) for ours in columns}
    for ours, column in theirs.items():
        if column not in table.column_names:
            raise InputError(
                f"{where}: no column '{column}' (found: {', '.join(table.column_names)});"
                f" {field}.columns.{ours} names it"
            )
    if len(table) == 0:
        raise InputError(f"{where}: the data set is empty ({field})")
    rows: list[dict[str, str]] = []
    for number, row in enumerate(table.select_columns(list(set(theirs.values()))), start=1):
        rows.append({ours: row[column] for ours, column in theirs.items()})
        for ours, value in rows[-1].items():
            if not isinstance(value, str) or not value.strip():
                column = theirs[ours]
                raise InputError(
                    f"{where}:{number}: column '{column}' is {_kind(value)}, not text ({field})"
                )
    return rows


def _kind(value: Any) -> str:
    return "empty" if value is None or isinstance(value, str) else f"a {type(value).__name__}"


def local_file(path: str, split: str, field: str) -> Path | None:
    """The local file of a split; None when `path` is meant as a hub data set."""
    place = Path(path)
    if place.is_file():
        return place
    if not place.is_dir():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local:
            raise InputError(f"{path}: no such file or folder ({field}.path)")
        return None
    if (place / split).is_file():
        return place / split
    for ending in ENDINGS:
        if (place / f"{split}{ending}").is_file():
            return place / f"{split}{ending}"
    raise InputError(f"{place}: no file {split}{{{','.join(ENDINGS)}}} in this folder ({field})")


def _load(source: Source, split: str, file: Path | None, field: str) -> Any:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # slow to import, and the controller never needs it

    try:
        if file is None:
            return datasets.load_dataset(source.path, split=split)
        kind = "parquet" if file.suffix == ".parquet" else "json"
        return datasets.load_dataset(kind, data_files=str(file), split="train")
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"{file or source.path}: cannot load split '{split}' ({field}): {first}"
        ) from error


def _check_json_lines(file: Path) -> None:
    """Find the first bad line ourselves: `datasets` does not say which one it is."""
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise InputError(f"{file}:{number}: not a JSON object")
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{number}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number + 1}: not UTF-8 text") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if number == 0:
        raise InputError(f"{file}: the data set is empty")


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def begin_iteration(config: Config, folder: RunFolder, iteration: int) -> None:
    """Draw an iteration's prompts and cut it into shards, if that has not been done.

    The draw is a function of (run seed, iteration): N rows of the train split, with replacement
    (duplicates are separate rows) or without. Iteration 0 only evaluates.
    """
    if iteration in folder.shardings():
        return
    total = folder.data_facts("prompts-train")["rows"]
    rng = np.random.default_rng([config.seed, iteration])
    count = config.sampling.prompts if iteration else 0
    rows = rng.choice(total, size=count, replace=config.sampling.replacement)
    held_out = {
        split: evaluated_rows(config, folder, split, iteration) for split in ("valid", "test")
    }
    draw = {"rows": rows.tolist(), **held_out}
    folder.begin(iteration, draw, sharding(config, folder, iteration))


def sharding(config: Config, folder: RunFolder, iteration: int) -> Sharding:
    """How an iteration that begins now is cut."""
    count = config.sampling.prompts if iteration else 0
    held_out = sum(evaluated_rows(config, folder, s, iteration) for s in ("valid", "test"))
    return Sharding(
        sample=cut(count, config.sampling.group, config.cluster.sample.shards),
        evaluate=cut(held_out, config.evaluation.group, config.cluster.evaluate.shards),
    )


def evaluated_rows(config: Config, folder: RunFolder, split: str, iteration: int) -> int:
    """How many rows of a split an iteration is evaluated on: test rows at 0 and at the end."""
    asked = config.evaluation.prompts if split == "valid" else config.evaluation.test_prompts
    if split == "test" and (not asked or iteration not in (0, config.iterations)):
        return 0
    if folder.has_data(f"prompts-{split}"):
        rows: int = folder.data_facts(f"prompts-{split}")["rows"]
        return min(rows, asked or rows)
    if asked:  # only a plan is asked for, before anything has been frozen
        return asked
    return len(read(config.data.prompts, split, ("prompt",), "data.prompts"))


def drawn_prompts(folder: RunFolder, iteration: int, start: int, end: int) -> list[str]:
    """Raw prompts of rows [start, end) of an iteration's draw."""
    rows = folder.draw(iteration)["rows"][start:end]
    return [row["prompt"] for row in folder.read_data("prompts-train", rows)]


def held_out_prompts(
    folder: RunFolder, iteration: int, start: int, end: int
) -> list[tuple[str, int, str]]:
    """(split, row, raw prompt) of rows [start, end) of what an iteration is evaluated on."""
    draw = folder.draw(iteration)
    places = [("valid", i) for i in range(draw["valid"])] + [
        ("test", i) for i in range(draw["test"])
    ]
    found = []
    for split in ("valid", "test"):
        rows = [i for s, i in places[start:end] if s == split]
        if rows:
            texts = folder.read_data(f"prompts-{split}", rows)
            found += [(split, i, t["prompt"]) for i, t in zip(rows, texts, strict=True)]
    return found

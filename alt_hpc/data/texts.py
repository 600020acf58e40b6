"""Rows of text from a hub data set or local files, as a stream, each checked."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from alt_hpc.config import HeldOut, Source
from alt_hpc.errors import InputError, blaming, one_line

Numbered = Iterator[tuple[int, dict[str, Any]]]  # (line, row)
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def read(
    source: Source | HeldOut, split: str, columns: tuple[str, ...], field: str
) -> Iterator[dict[str, str]]:
    """The rows of a split with our column names, as a stream, each checked when its turn comes.

    `split` is the key that names it, `field` the config section, for errors.
    """
    theirs = {ours: source.columns.get(ours, ours) for ours in columns}
    with blaming(field):
        where, numbered = _find(source.path, getattr(source, split), f".{split}")
        first = next(numbered, None)
        if first is None:
            raise InputError(f"{where}: the data set is empty")
        for ours, column in theirs.items():
            if column not in first[1]:
                found = one_line(", ".join(first[1]))
                problem = f"{where}: no column '{column}' (found: {found})"
                raise InputError(problem, f".columns.{ours}")
        for number, row in chain([first], numbered):
            for column in theirs.values():
                if problem := _problem(row.get(column)):
                    raise InputError(f"{where}:{number}: column '{column}' {problem}")
            yield {ours: row[column] for ours, column in theirs.items()}


def _problem(value: Any) -> str:
    """Why a value cannot be used as text, or nothing."""
    if value is None or value == "":
        return "is missing or empty, not text"
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not text"
    if not value.strip():
        return "is blank, not text"
    if value.encode(errors="ignore").decode() != value:
        return "holds half a character (a lone surrogate)"
    return ""


def _find(path: str, name: str, split: str) -> tuple[str, Numbered]:
    """Where a split stands, for errors, and its rows: in a folder, or else in a hub data set."""
    place = Path(path)
    if place.is_file():
        raise InputError(f"{path}: is a file; give the folder that holds it", ".path")
    if not place.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise InputError(f"{path}: no such folder", ".path")
        return f"{path} ({name})", _load(path, name, split)
    file = next(filter(Path.is_file, [place / f"{name}{end}" for end in ("", *ENDINGS)]), None)
    if file is None:
        kinds = ",".join(ENDINGS)
        raise InputError(f"{place}: no file {name}{{{kinds}}} in this folder", split)
    if file.suffix == ".parquet":
        return str(file), _read_parquet(file)
    if ".json" in file.name:
        return str(file), _read_json_lines(file)
    raise InputError(f"{file}: neither JSONL nor Parquet ({', '.join(ENDINGS)})", split)


def _load(path: str, name: str, split: str) -> Numbered:
    """Rows of a hub data set, which `datasets` maps into memory."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # slow to import, and the controller never needs it

    from alt_hpc.lm import fetch

    away = fetch.unreachable()
    try:
        with fetch.not_asked() if away else contextlib.nullcontext():
            return enumerate(datasets.load_dataset(path, split=name), start=1)
    except Exception as error:
        if away or isinstance(error, datasets.exceptions.DatasetNotFoundError):
            problem = "no such folder, and no such data set in the local cache or on the hub"
            raise InputError(f"{path}: {problem} ({away or _reason(error)})", ".path") from error
        problem = f"{path}: cannot load split '{name}' ({_reason(error)})"
        raise InputError(problem, split) from error


def _read_parquet(file: Path) -> Numbered:
    """Not by `datasets`, which fails on an empty table and prints tracebacks of its own."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1000))
            yield from enumerate(rows, start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: cannot be read ({_reason(error)})") from error


def _read_json_lines(file: Path) -> Numbered:
    """Not by `datasets`, which does not say which line is bad."""
    opened: Any = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, _json_object(text, f"{file}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({_reason(error)})") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (RecursionError, ValueError) as error:  # bad JSON, or a number of 5,000 digits
        reason = getattr(error, "msg", None) or _reason(error)
        raise InputError(f"{where}: not valid JSON ({reason})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object")
    return row


def _reason(error: BaseException) -> str:
    """The first line of the error at the root: `datasets` wraps the telling one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line((str(error).strip() or type(error).__name__).split("\n")[0][:200])

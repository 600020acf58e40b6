"""Rows of text from a hub data set or local files, as a stream, each checked."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

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
    with blaming(field):
        yield from _read(source, split, columns, field)


def _read(
    source: Source | HeldOut, split: str, columns: tuple[str, ...], field: str
) -> Iterator[dict[str, str]]:
    name = getattr(source, split)
    file = local_file(source.path, name, field, split)
    where = str(file or f"{source.path} ({name})")
    if file is None:
        numbered = _load(source.path, name, field, split)
    elif file.suffix == ".parquet":
        numbered = _read_parquet(file)
    elif ".json" in file.name:
        numbered = _read_json_lines(file)
    else:
        kinds = ", ".join(ENDINGS)
        raise InputError(f"{file}: neither JSONL nor Parquet ({kinds})", f"{field}.{split}")
    first = next(numbered, None)
    if first is None:
        raise InputError(f"{where}: the data set is empty")
    theirs = {ours: source.columns.get(ours, ours) for ours in columns}
    for ours, column in theirs.items():
        if column not in first[1]:
            raise InputError(
                f"{where}: no column '{column}' (found: {one_line(', '.join(first[1]))})",
                f"{field}.columns.{ours}",
            )
    yield from _texts(chain([first], numbered), theirs, where)


def _texts(numbered: Numbered, theirs: dict[str, str], where: str) -> Iterator[dict[str, str]]:
    for number, row in numbered:
        for column in theirs.values():
            if problem := _problem(row.get(column)):
                raise InputError(f"{where}:{number}: column '{column}' {problem}")
        yield {ours: row[column] for ours, column in theirs.items()}


def _problem(value: Any) -> str | None:
    """Why a value cannot be used as text, or None."""
    if value is None or value == "":
        return "is missing or empty, not text"
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not text"
    if not value.strip():
        return "is blank, not text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return None


def local_file(path: str, name: str, field: str, split: str) -> Path | None:
    """The local file of a split by its `name`; None when `path` is meant as a hub data set."""
    place = Path(path)
    if place.is_file():
        raise InputError(f"{path}: is a file; give the folder that holds it", f"{field}.path")
    if not place.is_dir():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local:
            raise InputError(f"{path}: no such folder", f"{field}.path")
        return None
    if (place / name).is_file():
        return place / name
    for ending in ENDINGS:
        if (place / f"{name}{ending}").is_file():
            return place / f"{name}{ending}"
    kinds = ",".join(ENDINGS)
    raise InputError(f"{place}: no file {name}{{{kinds}}} in this folder", f"{field}.{split}")


def _load(path: str, name: str, field: str, split: str) -> Numbered:
    """Rows of a hub data set, which `datasets` maps into memory."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # slow to import, and the controller never needs it

    from alt_hpc.lm import fetch

    away = fetch.unreachable()
    try:
        with fetch.not_asked() if away else contextlib.nullcontext():
            table = datasets.load_dataset(path, split=name)
    except Exception as error:
        missing = away or isinstance(error, datasets.exceptions.DatasetNotFoundError)
        if missing:
            raise InputError(
                f"{path}: no such folder, and no such data set in the local cache or on the hub"
                f" ({away or _reason(error)})",
                f"{field}.path",
            ) from error
        problem = f"{path}: cannot load split '{name}' ({_reason(error)})"
        raise InputError(problem, f"{field}.{split}") from error
    return enumerate(table, start=1)


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


def _reason(error: BaseException) -> str:
    """The first line of the error at the root: `datasets` wraps the telling one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line((str(error).strip() or type(error).__name__).split("\n")[0][:200])


def _read_json_lines(file: Path) -> Numbered:
    """Not by `datasets`, which does not say which line is bad."""
    number = 0
    try:
        with _open(file) as lines:
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


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    return file.open("rb")

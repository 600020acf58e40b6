"""Rows of text that a run uses: read from the hub or local files, each checked, and frozen."""

import contextlib
import datetime
import decimal
import gzip
import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alt_hpc.config import Config, HeldOut, Learned
from alt_hpc.domains import Domain
from alt_hpc.domains.domain import around
from alt_hpc.errors import InputError, blaming, one_line
from alt_hpc.graph import COMPARISONS
from alt_hpc.run import rows
from alt_hpc.run.folder import RunFolder
from alt_hpc.settings import digest

PROMPTS = "prompts-train"  # the rows that iterations are drawn from
LABELLED = "sft-train"  # the rows that SFT learns from, where they are not those
WORD = re.compile(r"\w+")
Numbered = Iterator[tuple[int, dict[str, Any]]]  # (line, row)
PLAIN = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)  # as text
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class Wanted(NamedTuple):
    """Rows that a run uses: what they are called in its folder, and where they come from."""

    name: str
    source: Learned | HeldOut
    split: str  # the key of the source that names it
    columns: tuple[str, ...]
    field: str  # of the config
    limit: int | None = None
    without: tuple["Wanted", ...] = ()  # splits whose posts it does without


def wanted(config: Config) -> Iterator[Wanted]:
    """All rows of text that a config uses."""
    prompts, pairs, field = config.data.prompts, config.data.comparisons, "data.prompts"
    one, pair = ("prompt",), ("prompt", "chosen", "rejected")
    learns = config.sft is not None and config.policy.model is None
    label = ("label",) if learns and labelled(config) == PROMPTS else ()
    without = _without(config, prompts)
    yield Wanted(PROMPTS, prompts, "train", (*one, *label), field, prompts.limit, without)
    if learns and (sft := config.data.sft):
        without = _without(config, sft)
        columns = (*one, "label")
        yield Wanted(LABELLED, sft, "train", columns, "data.sft", sft.limit, without)
    held = (*one, *(("label",) if config.evaluate.references else ()))
    yield Wanted("prompts-valid", prompts, "valid", held, field, prompts.valid_limit)
    if config.evaluate.test_prompts:
        yield Wanted("prompts-test", prompts, "test", held, field)
    if pairs is not None and (config.reward.trained or config.judges_humans):
        limits = {"train": pairs.limit, "valid": pairs.valid_limit}
        for split, limit in limits.items() if config.reward.trained else [*limits.items()][1:]:
            without = _without(config, pairs) if split == "train" else ()
            name = f"comparisons-{split}"
            yield Wanted(name, pairs, split, pair, "data.comparisons", limit, without)
    for key, held_out in config.evaluate.sets.items():
        name, field = of_set(config, key), f"evaluate.sets.{key}"
        yield Wanted(name, held_out, "split", held, field, held_out.prompts)


def labelled(config: Config) -> str:
    """What the rows are called that SFT learns from."""
    return PROMPTS if config.data.sft is None else LABELLED


def _without(config: Config, source: Learned) -> tuple[Wanted, ...]:
    """The splits, whole, whose posts a source's train split does without."""
    named = [(name, *name.split("-")) for name in source.without]
    return tuple(
        Wanted(name, getattr(config.data, section), split, ("prompt",), f"data.{section}")
        for name, section, split in named
    )


def of_set(config: Config, name: str) -> str:
    """What a set's rows are called in a run; a further set may be given other settings later."""
    if name in config.evaluate.sets:
        return f"set-{name}-{digest(config.evaluate.sets[name].model_dump())[:8]}"
    if name == COMPARISONS:
        return f"{COMPARISONS}-valid"
    return f"prompts-{name}"


def alike(config: Config, other: RunFolder) -> list[Wanted]:
    """What a config uses that another run has frozen with the same settings."""
    if other.config().domain.bare != config.domain.bare:
        return []
    theirs = [one for one in wanted(other.config()) if rows.is_frozen(other, one.name)]
    return [one for one in wanted(config) if one in theirs]


def freeze(config: Config, run: RunFolder, other: RunFolder | None = None) -> None:
    """Write the rows that a run uses into its folder, once; to a run that exists, what is new.

    What another run, from which this one takes, has frozen alike is taken. InputError, with file
    and line, where there is none, a column is missing, a row is no text.
    """
    theirs = alike(config, other) if other is not None else []
    for one in wanted(config):
        if run.exists() and rows.is_frozen(run, one.name):
            if "label" in one.columns and one.split != "train":
                _check_labels(rows.frozen(run, one.name), one)
            continue
        if other is not None and one in theirs:
            rows.take_frozen(run, one.name, other)
            if config.method.adds_tokens:
                list(_plain_text(iter(rows.frozen(run, one.name)), config, one))
        else:
            kept = chosen(one, config.domain)
            rows.freeze(run, one.name, _plain_text(kept, config, one))
    asked, count = config.sample.prompts, rows.count(run, PROMPTS)
    if not config.sample.replacement and count < asked:
        problem = f"{asked} prompts cannot be drawn without replacement from {count} rows"
        raise InputError(problem, "sample.prompts")


def chosen(one: Wanted, domain: Domain) -> Iterator[dict[str, Any]]:
    """The rows that are used of those there: the first ones, or as many drawn, in their order.

    Each is an example of the domain. InputError where what the source leaves out leaves none.
    """
    found, of = read(one.source, one.split, one.columns, one.field), one.source
    if isinstance(of, HeldOut):
        yield from map(domain.example, _held_out(of, found))
        return
    kept = islice(_left(one, of, map(domain.example, found), domain), one.limit)
    if (first := next(kept, None)) is None:
        given = ", ".join(name for name in ("longest", "half", "without") if getattr(of, name))
        raise InputError(f"{of.path} ({getattr(of, one.split)}): {given} leaves no row", one.field)
    yield from chain([first], kept)


def _left(
    one: Wanted, source: Learned, found: Iterable[dict[str, Any]], domain: Domain
) -> Iterator[dict[str, Any]]:
    """The rows that a source does not leave out; half and other splits count for training alone."""
    others = {
        post(domain, domain.example(row)["prompt"])
        for other in one.without
        for row in read(other.source, other.split, other.columns, other.field)
    }
    half = source.half if one.split == "train" else None
    for row in found:
        its = post(domain, row["prompt"]) if half or others else b""
        short = source.longest is None or len(row["prompt"]) <= source.longest
        if short and its not in others and (half is None or half == "ab"[its[-1] % 2]):
            yield row


def post(domain: Domain, prompt: str) -> bytes:
    """sha256 of a prompt's post, as words in lower case: the same post has the same."""
    words = WORD.findall(domain.post(prompt).casefold())
    return hashlib.sha256(" ".join(words).encode()).digest()


def _held_out(of: HeldOut, found: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first rows of a set, or as many drawn, in its template."""
    if of.seed is not None and of.prompts is not None:
        there = list(found)
        count = min(of.prompts, len(there))
        drawn = np.random.default_rng(of.seed).choice(len(there), count, replace=False)
        found = (there[row] for row in sorted(drawn))
    it = around(of.template)
    for row in islice(found, of.prompts):
        yield {**row, "prompt": it.front + row["prompt"] + it.behind}


def _check_labels(found: Iterable[dict[str, Any]], one: Wanted) -> None:
    """Raise InputError where rows that were frozen without a need of labels have none."""
    for number, row in enumerate(found):
        if problem := _problem(row.get("label")):
            where = f"row {number} of {one.name}, as the run has it"
            raise InputError(f"{where}: column 'label' {problem}", "evaluate.references")


def _plain_text(
    found: Iterator[dict[str, Any]], config: Config, of: Wanted
) -> Iterator[dict[str, Any]]:
    """Rows as they are; InputError where a prompt spells out a token that the method adds."""
    tokens = config.method.levels if config.method.adds_tokens else []
    for number, row in enumerate(found):
        for token in tokens:
            if token in row["prompt"]:
                problem = f"row {number} of {of.name} has {token} in its text"
                raise InputError(
                    f"{problem}, a token of method.kind: {config.method.kind}", of.field
                )
        yield row


def read(
    source: Learned | HeldOut, split: str, columns: tuple[str, ...], field: str
) -> Iterator[dict[str, Any]]:
    """The rows of a split with our column names, as a stream, each checked when its turn comes.

    `columns` are those that must be text; further ones are kept as JSON has them, unchecked.
    `split` is the key that names it, `field` the config section, for errors.
    """
    theirs = {ours: source.columns.get(ours, ours) for ours in columns}
    renamed = {ours: column for ours, column in source.columns.items() if ours not in theirs}
    taken = {*theirs.values(), *renamed.values()}
    with blaming(field):
        where, numbered = _find(source.path, source.name, getattr(source, split), f".{split}")
        first = next(numbered, None)
        if first is None:
            raise InputError(f"{where}: the data set is empty")
        for ours, column in theirs.items():
            if column not in first[1]:
                problem = f"no column '{column}' (found: {one_line(', '.join(first[1]))})"
                raise InputError(f"{where}: {problem}", f".columns.{ours}")
        for number, row in chain([first], numbered):
            for column in theirs.values():
                if problem := _problem(row.get(column)):
                    raise InputError(f"{where}:{number}: column '{column}' {problem}")
            further = {column: value for column, value in row.items() if column not in taken}
            further |= {ours: row[column] for ours, column in renamed.items() if column in row}
            yield {**_as_json(further), **{ours: row[column] for ours, column in theirs.items()}}


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold; dates and the like as text."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            text = json.dumps({column: value}, ensure_ascii=False, default=_plain)
            text.encode()  # no half a character
            found |= json.loads(text, parse_constant=lambda name: None)  # NaN and the infinities
    return found


def _plain(value: Any) -> str:
    if not isinstance(value, PLAIN):
        raise TypeError
    return str(value)


def _problem(value: Any) -> str:
    if value is None or value == "":
        return "is missing or empty, not text"
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not text"
    if not value.strip():
        return "is blank, not text"
    if value.encode(errors="ignore").decode() != value:
        return "holds half a character (a lone surrogate)"
    return ""


def _find(path: str, kind: str | None, name: str, split: str) -> tuple[str, Numbered]:
    """Where a split stands, for errors, and its rows: in a folder, or else in a hub data set.

    `kind` is the data set's configuration, `split` the key that names the split.
    """
    place = Path(path)
    if place.is_file():
        raise InputError(f"{path}: is a file; give the folder that holds it", ".path")
    if not place.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise InputError(f"{path}: no such folder", ".path")
        return f"{path} ({name})", _load(path, kind, name, split)
    if kind is not None:
        raise InputError(f"{path}: is a folder, which has no configurations", ".name")
    file = next(filter(Path.is_file, [place / f"{name}{end}" for end in ("", *ENDINGS)]), None)
    if file is None:
        raise InputError(f"{place}: no file {name}{{{','.join(ENDINGS)}}} in this folder", split)
    if file.suffix == ".parquet":
        return str(file), _read_parquet(file)
    if ".json" in file.name:
        return str(file), _read_json_lines(file)
    raise InputError(f"{file}: neither JSONL nor Parquet ({', '.join(ENDINGS)})", split)


def _load(path: str, kind: str | None, name: str, split: str) -> Numbered:
    """Rows of a hub data set, which `datasets` maps into memory."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # slow to import, and the controller never needs it

    from alt_hpc.lm import fetch

    away = fetch.unreachable()
    try:
        with fetch.not_asked() if away else contextlib.nullcontext():
            return enumerate(datasets.load_dataset(path, kind, split=name), start=1)
    except Exception as error:
        if away or isinstance(error, datasets.exceptions.DatasetNotFoundError):
            problem = "no such folder, and no such data set in the local cache or on the hub"
            raise InputError(f"{path}: {problem} ({away or _reason(error)})", ".path") from error
        problem = f"{path}: cannot load split '{name}' ({_reason(error)})"
        raise InputError(problem, split) from error


def _read_parquet(file: Path) -> Numbered:
    """Not by `datasets`, which fails on an empty table and prints tracebacks of its own."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            found = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1000))
            yield from enumerate(found, start=1)
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
                if not text.strip():
                    continue
                if not isinstance(row := json.loads(text), dict):
                    raise InputError(f"{file}:{number}: not a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({_reason(error)})") from error
    except (RecursionError, ValueError) as error:  # bad JSON, or a number of 5,000 digits
        reason = getattr(error, "msg", None) or _reason(error)
        raise InputError(f"{file}:{number}: not valid JSON ({reason})") from error


def _reason(error: BaseException) -> str:
    """The first line of the error at the root: `datasets` wraps the telling one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line((str(error).strip() or type(error).__name__).split("\n")[0][:200])

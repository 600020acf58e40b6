"""Rows of a run: the texts that were frozen when it began, and those that its pieces are."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.run.files import read_lines, replacing, sha256, take, write_atomically
from alt_hpc.run.folder import RunFolder


def freeze(run: RunFolder, name: str, texts: Iterable[Mapping[str, Any]]) -> int:
    """Write rows of text under a name; returns how many."""
    run.layout.data.mkdir(exist_ok=True)
    (path, about), count, longest = run.layout.frozen(name), 0, dict[str, int]()
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in texts:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            for column, text in row.items():
                if isinstance(text, str):
                    longest[column] = max(longest.get(column, 0), len(text.encode()))
    known = {"rows": count, "sha256": sha256(path), "longest": longest}
    write_atomically(about, json.dumps(known))
    return count


def take_frozen(run: RunFolder, name: str, other: RunFolder) -> None:
    """Take texts that another run has frozen under this name, their checksum verified."""
    theirs, ours = other.layout.frozen(name), run.layout.frozen(name)
    if not theirs[0].is_file() or sha256(theirs[0]) != checksum(other, name):
        raise InputError(f"{theirs[0]}: the frozen data was changed since the run began")
    for source, target in zip(theirs, ours, strict=True):
        take(source, target)


def checksum(run: RunFolder, name: str) -> str:
    """sha256 (hex) of frozen texts, as they were."""
    return str(json.loads(run.layout.frozen(name)[1].read_text())["sha256"])


def is_frozen(run: RunFolder, name: str) -> bool:
    return run.layout.frozen(name)[1].exists()


def longest(run: RunFolder, name: str) -> dict[str, int]:
    """Bytes of the longest text of each column of frozen rows; empty where they are not there."""
    about = run.layout.frozen(name)[1]
    return dict(json.loads(about.read_text()).get("longest", {})) if about.exists() else {}


def count(run: RunFolder, name: str) -> int:
    """How many frozen texts there are of a name."""
    return int(json.loads(run.layout.frozen(name)[1].read_text())["rows"])


def frozen(run: RunFolder, name: str, rows: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Frozen texts, all or those asked for, after checking the file's checksum."""
    path, _ = run.layout.frozen(name)
    if not path.is_file() or sha256(path) != checksum(run, name):
        raise InputError(f"{path}: the frozen data was changed since the run began")
    asked = list(range(count(run, name)) if rows is None else rows)
    needed = set(asked)
    with path.open("rb") as file:
        lines = {row: line for row, line in enumerate(file) if row in needed}
    return [json.loads(lines[row]) for row in asked]


def of_piece(run: RunFolder, piece: Piece) -> Iterator[dict[str, Any]]:
    """Rows of a whole piece, its checksum verified first."""
    return read_lines(run.manifests.open(piece)[0] / run.layout.rows(piece))


def of_stage(run: RunFolder, iteration: int, stage: str) -> Iterator[dict[str, Any]]:
    """Rows of all shards of a stage, in the order of the draw."""
    for piece in run.graph().of(iteration, stage):
        yield from of_piece(run, piece)

"""Rows of a run: the texts that were frozen when it began, and those that its pieces are."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from alt_hpc.errors import InputError
from alt_hpc.graph import Piece
from alt_hpc.run.files import read_lines, replacing, sha256, write_atomically
from alt_hpc.run.folder import RunFolder


def freeze(run: RunFolder, name: str, texts: Iterable[Mapping[str, str]]) -> int:
    """Write rows of text under a name; returns how many. Row i starts at byte offsets[i]."""
    layout = run.layout
    layout.data.mkdir(exist_ok=True)
    offsets, position = array("q", [0]), 0
    with replacing(layout.texts(name)) as temporary:
        with temporary.open("wb") as file:
            for row in texts:
                position += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                offsets.append(position)
        np.asarray(offsets, dtype="<i8").tofile(layout.offsets(name))
    facts = {"rows": len(offsets) - 1, "sha256": sha256(layout.texts(name))}
    write_atomically(layout.data_facts(name), json.dumps(facts))
    return len(offsets) - 1


def is_frozen(run: RunFolder, name: str) -> bool:
    """Whether texts of this name have been frozen."""
    return run.layout.data_facts(name).exists()


def count(run: RunFolder, name: str) -> int:
    """How many frozen texts there are of a name."""
    return int(_facts(run, name)["rows"])


def _facts(run: RunFolder, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(run.layout.data_facts(name).read_text())
    return facts


def frozen(run: RunFolder, name: str, rows: Iterable[int] | None = None) -> list[dict[str, str]]:
    """Frozen texts, all or those asked for, after checking the file's checksum."""
    path = run.layout.texts(name)
    if not path.is_file() or sha256(path) != _facts(run, name)["sha256"]:
        raise InputError(f"{path}: the frozen data was changed since the run began")
    offsets = np.fromfile(run.layout.offsets(name), dtype="<i8")
    wanted = range(len(offsets) - 1) if rows is None else rows
    with path.open("rb") as file:
        return [_read_row(file, int(offsets[i]), int(offsets[i + 1])) for i in wanted]


def _read_row(file: Any, start: int, end: int) -> dict[str, str]:
    file.seek(start)
    row: dict[str, str] = json.loads(file.read(end - start))
    return row


def of_piece(run: RunFolder, piece: Piece) -> Iterator[dict[str, Any]]:
    """Rows of a whole piece, its checksum verified first."""
    return read_lines(run.manifests.open(piece)[0] / run.layout.rows(piece))


def of_stage(run: RunFolder, iteration: int, stage: str) -> Iterator[dict[str, Any]]:
    """Rows of all shards of a stage, in the order of the draw."""
    for piece in run.graph().of(iteration, stage):
        yield from of_piece(run, piece)

"""How far pieces are: what tasks say of them, what is safe, and which shards lag far behind."""

import json
import time
from typing import Any

from alt_hpc import interrupt, process
from alt_hpc.graph import STAGES, Piece
from alt_hpc.run.files import read_lines, write_atomically
from alt_hpc.run.folder import RunFolder

MOST, LAGS = 0.6, 3.0  # a shard lags: this share is whole, and it takes so many times as long


def show(run: RunFolder, piece: Piece, done: int, total: int, unit: str, started: float) -> None:
    """Say how far a piece is: `done` of `total` units since `started` (seconds, epoch)."""
    interrupt.beat()
    values = {"done": done, "total": total, "unit": unit, "started": started}
    text = json.dumps({**values, "at": time.time(), "node": process.node()})
    write_atomically(run.layout.progress(piece), text)


def read(run: RunFolder, piece: Piece) -> dict[str, Any] | None:
    """What was last said of a piece, if anything was."""
    try:
        return dict(json.loads(run.layout.progress(piece).read_text()))
    except (OSError, json.JSONDecodeError):
        return None


def saved(run: RunFolder, piece: Piece) -> int:
    """Prompt groups kept, or the last step of a whole checkpoint: work that outlives its task."""
    kept = sum(1 for file in run.layout.kept(piece) for _ in read_lines(file))
    return max([kept, *run.layout.steps_saved(piece)])


def laggards(run: RunFolder, iteration: int, stage: str) -> list[str]:
    """A line for each shard that lags far behind, once most shards of its stage are whole."""
    pieces = run.graph().of(iteration, stage)
    if STAGES[stage].cut is None or len(pieces) < 3:
        return []
    found = {piece: run.manifests.get(piece) for piece in pieces}
    took = sorted(m.facts["seconds"] for m in found.values() if m is not None)
    if len(took) < MOST * len(pieces):
        return []
    usual, lines = took[len(took) // 2], []
    for piece in [piece for piece, manifest in found.items() if manifest is None]:
        now = read(run, piece) or {"started": time.time()}
        so_far = time.time() - now["started"]
        if so_far > LAGS * max(usual, LAGS):
            lines.append(
                f"{piece} lags on {now['node']}: {so_far:.0f} s so far,"
                f" {now['done']}/{now['total']} {now['unit']}; the others took {usual:.0f} s"
            )
    return lines

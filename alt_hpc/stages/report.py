"""report: one iteration's figures, TensorBoard curves, and the run's table and picture so far."""

from __future__ import annotations

import json
from typing import Any

from alt_hpc import curves, metrics, pieces
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import REPORT, RunFolder, write_atomically
from alt_hpc.summary import table


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Gather evaluation rows and scores of an iteration; write `report.json` and the curves."""
    config, k = folder.config(), piece.iteration
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    work = folder.attempt(piece, attempt)
    rows = list(folder.all_rows(k, "evaluate"))
    report: dict[str, Any] = {"iteration": k, "evaluation": _evaluation(rows)}
    report["stages"] = _stages(folder, k)
    report["samples"] = [_sample(row) for row in rows if row["variant"] == "best"][:5]
    if k:
        scores = list(folder.all_rows(k, "score"))
        rewards = metrics.by_quantile(
            [row["rewards"] for row in scores],
            [row["quantiles"] for row in scores],
            config.feedback.quantiles,
        )
        report["quantiles"] = [metrics.histogram(values) for values in rewards]
        report["set_aside"] = sum(all(q is None for q in row["quantiles"]) for row in scores)
    maker = pieces.reward_model(config)
    if k == 0 and maker is not None:
        report["reward_model"] = dict(folder.open_piece(maker)[1].facts)
    (work.folder / REPORT).write_text(json.dumps(report, indent=1))
    work.commit([REPORT], rows=len(rows), inputs=sources, facts={"report": report})
    write_atomically(folder.report_file, table(folder) + "\n")
    curves.write(folder, k)
    curves.draw(folder)


def _evaluation(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """split -> variant -> measures."""
    found: dict[str, dict[str, Any]] = {}
    for split, variant in dict.fromkeys((row["split"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["split"], row["variant"]) == (split, variant)]
        found.setdefault(split, {})[variant] = metrics.summarise(chosen)
    return found


def _sample(row: dict[str, Any]) -> str:
    """A held-out post with its summary, as Markdown."""
    text = f"{row['prompt']}\n\n**{row['text']}**\n\nreward {row['reward']}"
    return text.replace("\n", "  \n")


def _stages(folder: RunFolder, iteration: int) -> dict[str, dict[str, float]]:
    """Per stage: seconds of the median and the slowest shard, their ratio, and the queue wait."""
    submitted = {e["key"]: e["time"] for e in folder.journal() if e["event"] == "submitted"}
    sharding = folder.shardings()[iteration]
    counts = {"sample": len(sharding.sample), "score": len(sharding.sample), "train": 1}
    counts = (counts if iteration else {}) | {"evaluate": len(sharding.evaluate)}
    found = {}
    for stage, count in counts.items():
        manifests = [folder.manifest(Piece(iteration, stage, i)) for i in range(count)]
        made = [m for m in manifests if m is not None]
        seconds = sorted(m.facts["seconds"] for m in made)
        waits = [
            m.facts["started"] - submitted[f"{iteration}:{stage}:{m.attempt}"]
            for m in made
            if f"{iteration}:{stage}:{m.attempt}" in submitted
        ]
        if seconds:
            median = seconds[len(seconds) // 2]
            found[stage] = {
                "median_s": median,
                "slowest_s": seconds[-1],
                "straggling": seconds[-1] / max(median, 1e-3),
                "queue_wait_s": max(waits, default=0.0),
            }
    return found

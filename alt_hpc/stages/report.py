"""report: one iteration's figures, TensorBoard curves, and the run's table and picture so far."""

from __future__ import annotations

import json
import statistics
from typing import Any

from alt_hpc import curves, feedback, metrics, pieces
from alt_hpc.pieces import Piece
from alt_hpc.runfolder import REPORT, Manifest, RunFolder, write_atomically
from alt_hpc.summary import reports, table


def run(folder: RunFolder, piece: Piece, attempt: int) -> None:
    """Gather evaluation rows and scores of an iteration; write `report.json` and the curves.

    Table and curves come before the manifest: a report that was killed in between is made again,
    and so are they.
    """
    config, k = folder.config(), piece.iteration
    sources = folder.checksums(pieces.inputs(config, folder.shardings(), piece))
    work = folder.attempt(piece, attempt)
    rows = list(folder.all_rows(k, "evaluate"))
    manifests = _manifests(folder, k)
    report: dict[str, Any] = {"iteration": k, "evaluation": _evaluation(rows)}
    report["stages"] = {stage: _durations(folder, found) for stage, found in manifests.items()}
    report["cut"] = {
        stage: sum(manifest.facts.get("prompts_cut", 0) for manifest in found.values())
        for stage, found in manifests.items()
    }
    report["samples"] = [_sample(row) for row in rows if row["variant"] == "best"][:5]
    if k:
        scores = list(folder.all_rows(k, "score"))
        cuts = list(feedback.cuts(config.feedback, scores))
        rewards = metrics.by_quantile(
            [row["rewards"] for row in scores], cuts, config.feedback.quantiles
        )
        report["quantiles"] = [metrics.histogram(values) for values in rewards]
        report["set_aside"] = sum(all(q is None for q in cut) for cut in cuts)
    maker = pieces.reward_model(config)
    if k == 0 and maker is not None:
        report["reward_model"] = dict(folder.open_piece(maker)[1].facts)
    (work.folder / REPORT).write_text(json.dumps(report, indent=1))
    found = dict(sorted((reports(folder) | {k: report}).items()))
    write_atomically(folder.report_file, table(folder, found) + "\n")
    curves.write(folder, k, found)
    curves.draw(folder, found)
    work.commit([REPORT], rows=len(rows), inputs=sources, facts={"report": report})


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


def _manifests(folder: RunFolder, iteration: int) -> dict[str, dict[Piece, Manifest]]:
    """Manifests of an iteration's pieces by stage; at 0 also of those that prepared the run."""
    found: dict[str, dict[Piece, Manifest]] = {}
    for piece in folder.pieces():
        manifest = folder.manifest(piece)
        if piece.iteration == iteration and piece.stage != "report" and manifest is not None:
            found.setdefault(piece.stage, {})[piece] = manifest
    return found


def _durations(folder: RunFolder, made: dict[Piece, Manifest]) -> dict[str, float]:
    """Seconds of a stage's median and slowest shard, their ratio, and the longest queue wait.

    A shard waits from its sbatch, or from the end of the last piece that it is made from, until
    its task begins.
    """
    submitted = {e["key"]: e["time"] for e in folder.journal() if e["event"] == "submitted"}
    waits = []
    for piece, manifest in made.items():
        key = f"{piece.iteration}:{piece.stage}:{manifest.attempt}"
        sources = map(folder.manifest, pieces.inputs(folder.config(), folder.shardings(), piece))
        ends = [m.facts["started"] + m.facts["seconds"] for m in sources if m is not None]
        if key in submitted:
            waits.append(manifest.facts["started"] - max([submitted[key], *ends]))
    seconds = [manifest.facts["seconds"] for manifest in made.values()]
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "slowest_s": max(seconds),
        "straggling": max(seconds) / max(median, 1e-3),
        "queue_wait_s": max([0.0, *waits]),
    }

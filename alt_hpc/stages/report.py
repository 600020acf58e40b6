"""report: one iteration's figures, TensorBoard curves, and the run's table and picture so far."""

from __future__ import annotations

import json
import statistics
from typing import Any

from alt_hpc.graph import OWN, SCORE, Piece
from alt_hpc.plan import job_key
from alt_hpc.report import curves, measures
from alt_hpc.report.results import evaluated, reports
from alt_hpc.report.text import table
from alt_hpc.run import rows
from alt_hpc.run.files import write_atomically
from alt_hpc.run.journal import Submitted
from alt_hpc.run.layout import REPORT_FILE
from alt_hpc.run.manifests import Manifest
from alt_hpc.stages.work import Work


def run(work: Work) -> None:
    """Gather evaluations and scores of an iteration; write `report.json` and the curves.

    Table and curves come before the manifest: a report that was killed in between is made again,
    and so are they.
    """
    folder, k, method = work.run, work.piece.iteration, work.config.method
    evaluations = evaluated(folder, k)
    own = [row for row in evaluations if row["policy"] == OWN]
    shown = "best" if "best" in method.asked(k) else "plain"
    manifests = _manifests(work)
    report: dict[str, Any] = {"iteration": k, "evaluation": _evaluation(own)}
    report["policies"] = _policies(evaluations)
    report["stages"] = {stage: _durations(work, found) for stage, found in manifests.items()}
    report["cut"] = {
        stage: sum(manifest.facts.get("prompts_cut", 0) for manifest in found.values())
        for stage, found in manifests.items()
    }
    report["samples"] = [_sample(row) for row in own if row["variant"] == shown][:5]
    if k:
        scores = list(rows.of_stage(folder, k, SCORE))
        cuts = [label.quantiles for label in method.labels(scores)]
        levels = len(method.levels)
        rewards = measures.by_quantile([row["rewards"] for row in scores], cuts, levels)
        report["quantiles"] = [measures.histogram(values) for values in rewards]
        report["set_aside"] = sum(all(q is None for q in cut) for cut in cuts)
    maker = folder.graph().reward_model()
    if k == 0 and maker is not None:
        report["reward_model"] = dict(folder.manifests.open(maker)[1].facts)
    (work.attempt.folder / REPORT_FILE).write_text(json.dumps(report, indent=1))
    found = dict(sorted((reports(folder) | {k: report}).items()))
    write_atomically(folder.layout.table, table(folder, found) + "\n")
    curves.write(folder, k, found)
    curves.draw(folder, found)
    work.attempt.commit([REPORT_FILE], rows=len(evaluations), facts={"report": report})


def _evaluation(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """set -> variant -> measures, of one policy."""
    found: dict[str, dict[str, Any]] = {}
    for name, variant in dict.fromkeys((row["set"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["set"], row["variant"]) == (name, variant)]
        found.setdefault(name, {})[variant] = measures.summarise(chosen)
    return found


def _policies(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Policies that the run did not make: name -> set -> measures."""
    found = {}
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != OWN):
        sets = _evaluation([row for row in rows if row["policy"] == policy])
        found[policy] = {name: one for name, by in sets.items() for one in by.values()}
    return found


def _sample(row: dict[str, Any]) -> str:
    """A held-out post with its summary, as Markdown."""
    text = f"{row['prompt']}\n\n**{row['text']}**\n\nreward {row['reward']}"
    return text.replace("\n", "  \n")


def _manifests(work: Work) -> dict[str, dict[Piece, Manifest]]:
    """Manifests of an iteration's other pieces by stage."""
    found: dict[str, dict[Piece, Manifest]] = {}
    for piece in work.run.graph().pieces(work.piece.iteration):
        manifest = work.run.manifests.get(piece)
        if piece.stage != work.piece.stage and manifest is not None:
            found.setdefault(piece.stage, {})[piece] = manifest
    return found


def _durations(work: Work, made: dict[Piece, Manifest]) -> dict[str, float]:
    """Seconds of a stage's median and slowest shard, their ratio, and the longest queue wait.

    A shard waits from its sbatch, or from the end of the last piece that it is made from, until
    its task begins.
    """
    submitted = {e.key: e.time for e in work.run.journal.of(Submitted)}
    waits = []
    for piece, manifest in made.items():
        key = job_key(piece.iteration, piece.stage, manifest.attempt)
        sources = map(work.run.manifests.get, work.run.graph().sources(piece))
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

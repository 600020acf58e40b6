"""report: one iteration's figures, TensorBoard curves, and the run's table and picture so far."""

import json
import statistics
from typing import Any

from alt_hpc.graph import OWN, SCORE, Piece
from alt_hpc.plan import job_key
from alt_hpc.report import curves, measures
from alt_hpc.report.results import evaluated, reports
from alt_hpc.report.text import table
from alt_hpc.run import rows
from alt_hpc.run.files import locked, write_atomically
from alt_hpc.run.journal import Submitted
from alt_hpc.run.layout import REPORT_FILE
from alt_hpc.run.manifests import Manifest
from alt_hpc.stages.work import Work

WITHIN_S = 600.0  # how long a report waits for others of its run


def run(work: Work) -> None:
    """Gather evaluations and scores of an iteration; write `report.json` and the curves.

    Table and curves come before the manifest: a report that was killed in between is made again,
    and so are they.
    """
    folder, k, method = work.run, work.piece.iteration, work.config.method
    evaluations = evaluated(folder, k)
    made: dict[str, dict[Piece, Manifest]] = {}  # the iteration's other pieces, by stage
    for piece in folder.graph().pieces(k):
        manifest = folder.manifests.get(piece)
        if piece.stage != work.piece.stage and manifest is not None:
            made.setdefault(piece.stage, {})[piece] = manifest
    report = {"iteration": k, **_measured(evaluations)}
    report["stages"] = {stage: _durations(work, found) for stage, found in made.items()}
    report["shortened"] = {
        stage: sum(manifest.facts.get("prompts_shortened", 0) for manifest in found.values())
        for stage, found in made.items()
    }
    shown = (OWN, "best" if "best" in method.asked(k) else "plain")
    samples = [row for row in evaluations if (row["policy"], row["variant"]) == shown]
    report["samples"] = [_sample(row) for row in samples[:5]]
    if k:
        scores = list(rows.of_stage(folder, k, SCORE))
        found = [label.quantiles for label in method.labels(scores)]
        rewards = [row["rewards"] for row in scores]
        parts = measures.by_quantile(rewards, found, len(method.levels))
        report["quantiles"] = [measures.histogram(values) for values in parts]
        report["set_aside"] = sum(set(row) <= {None} for row in found)
    elif maker := folder.graph().reward_model():
        report["reward_model"] = dict(folder.manifests.open(maker)[1].facts)
    (work.attempt.folder / REPORT_FILE).write_text(json.dumps(report, indent=1))
    with locked(folder.layout.report_lock, WITHIN_S):  # one beside would not see this one
        known = dict(sorted((reports(folder) | {k: report}).items()))
        write_atomically(folder.layout.table, table(folder, known) + "\n")
        curves.write(folder, k, known)
        curves.draw(folder, known)
        work.attempt.commit([REPORT_FILE], rows=len(evaluations), facts={"report": report})


def _measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measures of the run's policy (set -> variant) and of others (policy -> set)."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["set"], row["variant"]), []).append(row)
    found: dict[str, Any] = {"evaluation": {}, "policies": {}}
    for (policy, name, variant), group in groups.items():
        if policy == OWN:
            found["evaluation"].setdefault(name, {})[variant] = measures.summarise(group)
        else:
            found["policies"].setdefault(policy, {})[name] = measures.summarise(group)
    return found


def _sample(row: dict[str, Any]) -> str:
    """A held-out post with its summary, as Markdown."""
    text = f"{row['prompt']}\n\n**{row['text']}**\n\nreward {row['reward']}"
    return text.replace("\n", "  \n")


def _durations(work: Work, made: dict[Piece, Manifest]) -> dict[str, float]:
    """Seconds of a stage's median and slowest shard, their ratio, and the longest queue wait.

    A shard waits from its sbatch, or from the end of the last piece that it is made from, until
    its task begins.
    """
    submitted = {e.key: e.time for e in work.run.journal.of(Submitted)}
    waits = [0.0]
    for piece, manifest in made.items():
        key = job_key(piece.iteration, piece.stage, manifest.attempt)
        sources = map(work.run.manifests.get, work.run.graph().sources(piece))
        ends = [m.facts["started"] + m.facts["seconds"] for m in sources if m is not None]
        if key in submitted:
            waits.append(manifest.facts["started"] - max([submitted[key], *ends]))
    seconds = [manifest.facts["seconds"] for manifest in made.values()]
    median, slowest = statistics.median(seconds), max(seconds)
    return {
        "median_s": median,
        "slowest_s": slowest,
        "straggling": slowest / max(median, 1e-3),
        "queue_wait_s": max(waits),
    }

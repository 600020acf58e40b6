"""report: one iteration's figures, TensorBoard curves, and the run's table and picture so far."""

import json
import statistics
from typing import Any

from alt_hpc.graph import OWN, SCORE, VALID, Piece
from alt_hpc.plan import Submission
from alt_hpc.report import curves, diagnosis, measures, results
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
    evaluations = results.evaluated(folder, k)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in evaluations:
        groups.setdefault((row["policy"], row["set"], row["variant"]), []).append(row)
    own: dict[str, Any] = {}  # set -> variant -> measures of the run's policy
    others: dict[str, Any] = {}  # policy -> set -> measures
    for (policy, name, variant), group in groups.items():
        found, outer, inner = (own, name, variant) if policy == OWN else (others, policy, name)
        found.setdefault(outer, {})[inner] = measures.summarise(group)
    report: dict[str, Any] = {"iteration": k, "evaluation": own, "policies": others}
    report |= {"stages": {}, "shortened": {}}
    for stage in folder.graph().stages(k):
        pieces = folder.graph().of(k, stage)
        made = {piece: m for piece in pieces if (m := folder.manifests.get(piece))}
        if made and stage != work.piece.stage:
            lost = [manifest.facts.get("prompts_shortened", 0) for manifest in made.values()]
            report["stages"][stage], report["shortened"][stage] = _durations(work, made), sum(lost)
    shown = (OWN, results.shown(folder, k))
    samples = [row for row in evaluations if (row["policy"], row["variant"]) == shown][:5]
    texts = [f"{r['prompt']}\n\n**{r['text']}**\n\nreward {r['reward']}" for r in samples]
    report["samples"] = [text.replace("\n", "  \n") for text in texts]  # as Markdown
    if k:
        scored = [(row, label.quantiles) for j, row, label in work.pool() if j == k]
        rewards, quantiles = [row["rewards"] for row, _ in scored], [qs for _, qs in scored]
        parts = measures.by_quantile(rewards, quantiles, len(method.levels))
        report["quantiles"] = [measures.histogram(values) for values in parts]
        report["set_aside"] = sum(set(row) <= {None} for row in quantiles)
        scores = filter(None, map(folder.manifests.get, folder.graph().of(k, SCORE)))
        report["answers_set_aside"] = sum(m.facts.get("answers_set_aside", 0) for m in scores)
        compared: dict[Any, list[Any]] = {}
        for row, _ in scored:
            compared.setdefault(method.together(row), []).append(row)
        report["parts"] = measures.spreads([*compared.values()], work.config.reward.weight)
    elif maker := folder.graph().reward_model():
        report["reward_model"] = dict(folder.manifests.open(maker)[1].facts)
    report["words"] = results.diagnosed(folder, evaluations)
    ruling = measures.ruling(report.get("parts", {}))
    report["lines"] = [*results.gains(folder, VALID, k, [evaluations]), *([ruling] * bool(ruling))]
    (work.attempt.folder / REPORT_FILE).write_text(json.dumps(report, indent=1))
    with locked(folder.layout.report_lock, WITHIN_S):  # one beside would not see this one
        known = dict(sorted((results.reports(folder) | {k: report}).items()))
        write_atomically(folder.layout.table, results.table(folder, known) + "\n")
        curves.write(folder, k, known)
        curves.draw(folder, known)
        work.attempt.commit([REPORT_FILE], rows=len(evaluations), facts={"report": report})
    words = report["words"]["fixed"]
    print(
        "\n".join([*report["lines"], *([diagnosis.sentence(words)] if words else [])]), flush=True
    )


def _durations(work: Work, made: dict[Piece, Manifest]) -> dict[str, float]:
    """Seconds of a stage's median and slowest shard, their ratio, and the longest queue wait.

    A shard waits from its sbatch, or from the end of the last piece that it is made from, until
    its task begins.
    """
    submitted = {e.key: e.time for e in work.run.journal.of(Submitted)}
    waits = [0.0]
    for piece, manifest in made.items():
        key = Submission(piece.stage, piece.iteration, manifest.attempt, ()).key
        if key in submitted:
            sources = map(work.run.manifests.get, work.run.graph().sources(piece))
            ends = [m.facts["started"] + m.facts["seconds"] for m in sources if m is not None]
            waits.append(manifest.facts["started"] - max([submitted[key], *ends]))
    seconds = [manifest.facts["seconds"] for manifest in made.values()]
    median, slowest = statistics.median(seconds), max(seconds)
    return {
        "median_s": median,
        "slowest_s": slowest,
        "straggling": slowest / max(median, 1e-3),
        "queue_wait_s": max(waits),
    }

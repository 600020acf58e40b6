"""The results of a run as its pieces hold them: reports of iterations, answers with measures."""

from __future__ import annotations

from typing import Any

from alt_hpc.graph import EVALUATE, MEASURE, OWN, REPORT, VALID, Piece
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder


def reports(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The reports of all iterations that have one."""
    found = {}
    for k in sorted(folder.graph().shardings):
        manifest = folder.manifests.get(Piece(k, REPORT))
        if manifest is not None:
            found[k] = manifest.facts["report"]
    return found


def best_iteration(folder: RunFolder) -> int | None:
    """The iteration with the highest mean reward on the valid split under the best feedback."""
    found = {k: report["evaluation"].get(VALID, {}) for k, report in reports(folder).items()}
    rewards = {k: by["best"]["reward"] for k, by in found.items() if "best" in by}
    known = {k: r for k, r in rewards.items() if r is not None}
    return max(known, key=lambda k: known[k], default=None)


def evaluated(folder: RunFolder, iteration: int) -> list[dict[str, Any]]:
    """What was evaluated with an iteration: an answer and its measures a row."""
    answers = rows_of.of_stage(folder, iteration, EVALUATE)
    measures = rows_of.of_stage(folder, iteration, MEASURE)
    return [one | two for one, two in zip(answers, measures, strict=True)]


def rows(folder: RunFolder, iteration: int, variant: str, name: str) -> list[dict[str, Any]]:
    """Answers of the run's policy to a set, asked in one way."""
    wanted = {"policy": OWN, "variant": variant, "set": name}
    found = evaluated(folder, iteration)
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]

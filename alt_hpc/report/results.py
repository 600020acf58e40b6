"""The results of a run as its pieces hold them: reports of iterations, answers with measures."""

from typing import Any

from alt_hpc.graph import EVALUATE, MEASURE, OWN, REPORT, VALID, Piece
from alt_hpc.run import rows as rows_of
from alt_hpc.run.folder import RunFolder


def reports(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The reports of all iterations that have one, in order."""
    found = {k: folder.manifests.get(Piece(k, REPORT)) for k in sorted(folder.graph().shardings)}
    return {k: manifest.facts[REPORT] for k, manifest in found.items() if manifest is not None}


def best_iteration(folder: RunFolder) -> int | None:
    """The iteration with the highest mean reward on the valid split under the best feedback."""
    found = {k: report["evaluation"].get(VALID, {}) for k, report in reports(folder).items()}
    rewards = {k: by["best"]["reward"] for k, by in found.items() if "best" in by}
    known = {k: r for k, r in rewards.items() if r is not None}
    return max(known, key=lambda k: known[k], default=None)


def evaluated(folder: RunFolder, iteration: int) -> list[dict[str, Any]]:
    """What was evaluated with an iteration: an answer and its measures a row."""
    two = [rows_of.of_stage(folder, iteration, stage) for stage in (EVALUATE, MEASURE)]
    return [answer | measures for answer, measures in zip(*two, strict=True)]


def rows(folder: RunFolder, iteration: int, variant: str, name: str) -> list[dict[str, Any]]:
    """Answers of the run's policy to a set, asked in one way."""
    wanted = {"policy": OWN, "variant": variant, "set": name}
    return [row for row in evaluated(folder, iteration) if wanted.items() <= row.items()]

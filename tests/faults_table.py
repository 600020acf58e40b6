"""The table of faults, `faults.md`: what was broken, what happened, how long the whole run took."""

from __future__ import annotations

import os
import time
from pathlib import Path

TABLE: list[tuple[str, str, str, float]] = []  # fault, stages, what happened, seconds


def write() -> None:
    """New rows replace old ones of the same fault."""
    file = Path(__file__).parent / "faults.md"
    old = file.read_text().splitlines() if file.exists() else []
    rows = {line.split(" | ")[0]: line for line in old if line.startswith("| ")}
    rows.pop("| fault", None)
    for fault, stages, what, took in TABLE:
        rows[f"| {fault}"] = f"| {fault} | {stages} | {what} | {took:.0f} |"
    file.write_text(
        "# Faults, as broken and measured by `bash tests/run.sh --faults`\n\n"
        "Every run ended with an undisturbed run's policies, byte for byte, or stopped as told.\n"
        "Seconds are those of the whole run, recovery included: two iterations of stub stages\n"
        "(real and sites: one, real ones of tiny models); undisturbed they take as long as the\n"
        "first rows. The cluster has neither accounting (sacct) nor kill_invalid_depend, unless a\n"
        "row says so.\n"
        f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}.\n\n"
        "| fault | stages | what happened | s |\n|---|---|---|---|\n"
        + "\n".join(rows.values())
        + "\n"
    )

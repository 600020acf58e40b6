"""win-rates: what the judge's verdicts of an iteration come to; the table says it too.

A stage of its own, so that a report never waits for a judge, nor lacks where one fails.
"""

import json

from alt_hpc.report import curves, judged, results
from alt_hpc.run.files import locked, write_atomically
from alt_hpc.run.layout import REPORT_FILE
from alt_hpc.stages.work import Work

WITHIN_S = 600.0  # how long it waits for reports of its run


def run(work: Work) -> None:
    """Write the figures and their curves, and the run's table anew with their sentences."""
    found = judged.figures(work.run, work.piece.iteration)
    (work.attempt.folder / REPORT_FILE).write_text(json.dumps(found, indent=1))
    with locked(work.run.layout.report_lock, WITHIN_S):  # one beside would not see this one
        work.attempt.commit([REPORT_FILE], rows=len(found["pairs"]), facts=found)
        if known := results.reports(work.run):
            write_atomically(work.run.layout.table, results.table(work.run, known) + "\n")
        curves.write_win_rates(work.run, work.piece.iteration)
    print("\n".join(found["lines"]), flush=True)

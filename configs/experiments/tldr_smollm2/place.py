"""The place of the words, by the rule of README: python place.py REPORT prints an arm's name.

REPORT is the folder of `alt-hpc report` over the runs with seed 1 of the three places. It is that
whose `Excellent.` gains most reward over its start on the validation posts.
"""

import csv
import sys
from pathlib import Path

ARMS = {"ALT-RM (behind)": "behind", "ALT-RM (after BOS)": "bos", "ALT-RM": "front"}

with (Path(sys.argv[1]) / "effects.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["method"] in ARMS]
wanted = {"set": "valid", "effect": "gain", "reward of": "reward"}
gains = {ARMS[row["method"]]: float(row["reward"]) for row in rows if wanted.items() <= row.items()}
if gains.keys() != {*ARMS.values()}:
    sys.exit(f"{sys.argv[1]}/effects.csv: the gain of a place is missing ({', '.join(gains)})")
for name, gain in gains.items():
    print(f"{name}: {gain:+.3f}", file=sys.stderr)
print(max(gains, key=lambda name: gains[name]))

#!/usr/bin/env bash
# The whole experiment: bash configs/experiments/tldr_smollm2/run.sh DATA RUNS [--slurm] [--set KEY=VALUE ...]
# DATA: the folder with tldr/, prompts/, comparisons/ and cnn_dailymail/. RUNS: where its runs lie.
# Give the same command again to go on. What is set is set in all arms.
# ALT_HPC_SMOLLM2: a folder with SmolLM2-135M-Instruct (none: the hub's). SEEDS: 1,2,3. PYTHON: an
# interpreter, as an absolute path (none: .venv's, or python3).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
[ $# -ge 2 ] || { sed -n 2,6p "${BASH_SOURCE[0]}" >&2; exit 2; }
data=$(cd "$1" && pwd)
mkdir -p "$2"
cd "$2"   # the configs name runs, models and data from here
shift 2
start=(run)
if [ "${1:-}" = --slurm ]; then
    start=(submit --wait)
    shift
fi
ln -sfn "$data" data
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

alt_hpc() { "$python" -m alt_hpc "$@"; }

arms() {   # arms SEEDS NAME ...: one run of each with each seed
    local seeds=$1 name configs=()
    shift
    for name in "$@"; do configs+=("$here/$name.yaml"); done
    alt_hpc "${start[@]}" "${configs[@]}" --seeds "$seeds" "${set[@]}"
}

set=("$@")
seeds=${SEEDS:-1,2,3}
first=${seeds%%,*}
base=${ALT_HPC_SMOLLM2:-HuggingFaceTB/SmolLM2-135M-Instruct}
alt_hpc "${start[@]}" "$here/start.yaml" --set "policy.base=$base" --set "reward.base=$base"
alt_hpc "${start[@]}" "$here/second.yaml" --set "policy.model=$base" --set "reward.base=$base"
arms "$first" behind front bos          # the place is chosen on validation posts of these
arms "$seeds" behind best none shuffled # the primary comparisons
arms "$first" behind unfiltered quark
runs=()
for name in behind front bos quark best none shuffled unfiltered; do runs+=("$name"-seed*); done
alt_hpc report "${runs[@]}" --to results

#!/usr/bin/env bash
# Sets everything up and runs configs/quickstart.yaml here: bash slurm/quickstart.sh [--slurm] [--set KEY=VALUE ...]
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/setup.sh

backend=local
if [ "${1:-}" = --slurm ]; then
    backend=slurm
    shift
    command -v sbatch >/dev/null || die "--slurm: sbatch is not on PATH."
fi
make_venv .venv slurm/lock.txt
smollm2
set -- --set policy.base="$SMOLLM2" --set reward.base="$SMOLLM2" "$@"
if [ "$backend" = local ]; then
    say "running configs/quickstart.yaml on this machine"
    exec "$PYTHON" -m alt_hpc run configs/quickstart.yaml "$@"
fi
say "running configs/quickstart.yaml on Slurm"
exec "$PYTHON" -m alt_hpc submit --wait configs/quickstart.yaml --set cluster.backend=slurm "$@"

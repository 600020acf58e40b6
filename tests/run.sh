#!/usr/bin/env bash
# Sets everything up and passes the tests: bash tests/run.sh [--newest] [pytest arguments]
# --newest: with the newest versions of everything instead of those of tests/lock.txt.
# Debian's Slurm, and what the tests over hosts of their own take (as root), are installed where they
# are missing and root or `sudo -n` is there.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/setup.sh

command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || {
    say "installing Debian's slurm-wlm"
    apt_install slurm-wlm || say "cannot install slurm-wlm here: the tests that need Slurm will fail"
}
if ! command -v slurmdbd >/dev/null && ! [ -x /usr/sbin/slurmdbd ]; then
    say "installing slurmdbd and mariadb-server"
    apt_install slurmdbd mariadb-server || say "cannot install slurmdbd: tests that need it will fail"
fi
missing=()
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || missing+=(iproute2)
command -v bindfs >/dev/null || missing+=(bindfs)
compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null || missing+=(libfaketime)
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    apt_install "${missing[@]}" || say "cannot install ${missing[*]}: tests that need it will fail"
fi
if [ "${1:-}" = --newest ]; then
    shift
    make_venv "${ALT_HPC_VENV:-.venv-newest}" newest test,quickstart
else
    make_venv "${ALT_HPC_VENV:-.venv}" tests/lock.txt
fi
smollm2
export ALT_HPC_SMOLLM2=$SMOLLM2
export ALT_HPC_DATA=${ALT_HPC_DATA:-$(cd .. && pwd)/shared/data}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
say "lint, types and layers"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
"${PYTHON%/*}/lint-imports" setup.cfg --no-logo
say "tests"
workers=2  # most tests wait for Slurm or use one core
[[ " $* " == *" --faults "* ]] && workers=0  # one process writes the table of faults
exec "$PYTHON" -m pytest --numprocesses $workers --dist worksteal --durations 25 "$@"

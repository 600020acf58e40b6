#!/usr/bin/env bash
# Checks and measures everything on one GPU within 9 minutes, without a network: bash tests/gpu.sh
#   bash tests/gpu.sh pack          first, where there is an index: the wheels that the other machine lacks
#   bash tests/gpu.sh --tiny        the same on the CPU at tiny sizes, as the tests do
#   bash tests/gpu.sh --only checks the checks alone; --only speed: the rest
#   bash tests/gpu.sh --within S    speed is measured of what can begin before the last minute of S
#   bash tests/gpu.sh --to FOLDER   where results.md and the run are written (default: runs/gpu)
# PYTHON names an interpreter with torch and transformers (default: python3).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WHEELS=tests/gpu/wheels
# What Python 3.12 with torch, transformers, tensorboard, pandas, pyarrow and matplotlib still lacks.
READY=(annotated-types defusedxml hjson nltk pydantic pydantic-core submitit typing-extensions
    typing-inspection)
BUILT=(deepspeed rouge-score)  # these have no wheel in the index

locked() {  # NAME==VERSION of tests/lock.txt
    local name
    for name in "$@"; do grep -oE "^$name==[^ ;]+" tests/lock.txt; done
}

pack() {
    rm -rf "$WHEELS"
    mkdir -p "$WHEELS"
    local platform platforms=()
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${platform}_x86_64")
    done
    # shellcheck disable=SC2046
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$WHEELS" \
        $(locked "${READY[@]}")
    # shellcheck disable=SC2046
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --wheel-dir "$WHEELS" $(locked "${BUILT[@]}")
    du -sh "$WHEELS"
}

if [ "${1:-}" = pack ]; then
    pack
    exit
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ " $* " != *" --tiny "* ]] && compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \
        "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD:$PWD/tests:$site${PYTHONPATH:+:$PYTHONPATH}
unset PYTHONDONTWRITEBYTECODE  # as in slurm/setup.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
limit=525
[[ " $* " == *" --tiny "* ]] && limit=850  # a busy machine of the tests
timeout --kill-after=10 $limit "$PYTHON" tests/gpu/check.py "$@"

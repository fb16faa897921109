#!/usr/bin/env bash
# Quick tests with other versions of transformers and torch, on a CPU.
#
#   tests/versions.sh OUT [TORCH:TRANSFORMERS ...]      e.g. out 2.11.0:5.18.0 2.14.1:5.24.0
#
# Each pair gets an environment that is removed after it. Over PYTHON's packages it has
# its own torch, torchvision, transformers and what these pin; all others are PYTHON's,
# which must be the project's environment (`make install`). OUT gets table.txt, a line
# for each pair, and a log of each. A torch other than PYTHON's takes up to 6 GB of disk
# and a download of up to 3 GB. The exit code is 1 if a pair failed.
# Environment: PYTHON (.venv/bin/python), TESTS (files of tests), WORK (where the
# environments are made), LIMIT (seconds for the tests of a pair).
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:?usage: versions.sh OUT [TORCH:TRANSFORMERS ...]}"
shift
python="${PYTHON:-$root/.venv/bin/python}"
# Models, processors and trainers of three families; positions, masks, caches.
tests="${TESTS:-tests/fast/test_families.py tests/fast/test_sampling.py}"
pairs=("$@")
if [ ${#pairs[@]} -eq 0 ]; then # both ends of both, and every release between
    pairs=(2.14.1:5.{18,19,20,21,22,23,24}.0 2.1{0,1,2,3}.0:5.{18,24}.0)
fi
work="$(mktemp -d "${WORK:-/tmp}/versions.XXXXXX")"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
: >"$out/table.txt"

try() { # TORCH TRANSFORMERS LOG: prints what came out
    local torch=$1 transformers=$2 log=$3 minor below
    minor="${torch#2.}"
    minor="${minor%%.*}"
    # torchvision 0.25 belongs to torch 2.10, 0.26 to 2.11 and so on
    "$python" -m venv --without-pip "$work/env" >"$log" 2>&1 || { echo "no venv"; return 1; }
    below="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "$below" >"$("$work/env/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
    # ===: no build with a local version, which PyPI's torchvision does not fit
    "$work/env/bin/python" -m pip install -q --disable-pip-version-check \
        --no-cache-dir "torch===$torch" "torchvision==0.$((minor + 15)).*" \
        "transformers==$transformers" >>"$log" 2>&1 || { echo "not installed"; return 1; }
    "$work/env/bin/python" -c 'import sys, torch, transformers
found = [torch.__version__.split("+")[0], transformers.__version__]
sys.exit(found != sys.argv[1:] and f"found {found}")' "$torch" "$transformers" \
        >>"$log" 2>&1 || { echo "does not import"; return 1; }
    # shellcheck disable=SC2086
    (cd "$root" && timeout -k 10 "${LIMIT:-900}" "$work/env/bin/python" -m pytest \
        -p no:cacheprovider --tb=short $tests) >>"$log" 2>&1
    local code=$?
    tail -n 1 "$log"
    return $code
}

failed=0
for pair in "${pairs[@]}"; do
    torch="${pair%%:*}"
    transformers="${pair##*:}"
    log="$out/torch-$torch-transformers-$transformers.log"
    result="$(try "$torch" "$transformers" "$log")" || failed=1
    printf 'torch %-8s transformers %-8s %s\n' "$torch" "$transformers" "$result" |
        tee -a "$out/table.txt"
    rm -rf "$work/env"
done
exit $failed

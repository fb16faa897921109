#!/usr/bin/env bash
# Collects the wheels that run.sh installs where there is no network.
#
#   tests/bench/gpu/wheels.sh PYTHON_VERSION TORCH [DIR]      e.g. 3.12 2.11 wheels
#
# Meant for an image that has torch, torchvision, accelerate, tokenizers, safetensors,
# huggingface-hub, pyarrow, pandas, xxhash and pytest, but not these. Most are pure
# Python; bitsandbytes is repacked with the kernels of one CUDA version. Under 45 MiB.
set -euo pipefail
version="${1:?usage: wheels.sh PYTHON_VERSION TORCH [DIR]}"
torch="${2:?usage: wheels.sh PYTHON_VERSION TORCH [DIR]}"
dir="${3:-wheels}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
constraints="$here/../../../constraints.txt"
python="${PYTHON:-python3}"
mkdir -p "$dir"

names="transformers trl peft datasets dill multiprocess bitsandbytes ijson psutil \
hypothesis sortedcontainers"
pinned=$(for name in $names; do grep -E "^$name==" "$constraints"; done)
platforms=$(for number in 17 24 27 28 34; do echo "--platform manylinux_2_${number}_x86_64"; done)
# shellcheck disable=SC2086
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp $platforms --platform manylinux2014_x86_64 -d "$dir" $pinned

case "$torch" in
    2.1[0-9]*) cuda=130 ;; # what PyPI's torch of that version is built for
    *) cuda=128 ;;
esac
"$python" "$here/trim_wheel.py" "$dir"/bitsandbytes-*.whl \
    --keep "libbitsandbytes_cuda$cuda.so" --keep libbitsandbytes_cpu.so
bytes=$(cat "$dir"/*.whl | wc -c)
echo "$(ls "$dir"/*.whl | wc -l) wheels, $((bytes / 1048576)) MiB in $dir"
[ "$bytes" -le $((45 * 1048576)) ] || { echo "more than 45 MiB"; exit 1; }

#!/usr/bin/env bash
# Wheels for tools/gpu_check.sh on a machine without a network, into .whl: what megatron-lfr needs beside torch, and the
# kernels that ours are compared with. Made for Python 3.12 on x86-64.
#
#     tools/gpu_wheels.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
needed=(tyro docstring_parser typeguard)
peers=(liger_kernel cut-cross-entropy) # to compare with: none is missed where the registry has none
fetch() {
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -c constraints.txt -d "$folder" "$1"
}
for name in "${needed[@]}"; do fetch "$name"; done
for name in "${peers[@]}"; do fetch "$name" || echo "$name: no wheel, it will be listed as not run" >&2; done
du -sh "$folder"

#!/usr/bin/env bash
# All that needs a GPU, in two commands of under 8 minutes each:
#
#     tools/gpu_check.sh check|measure OUT_FOLDER [--only PART,...]
#
# check: builds, runs the kernels' tests, compares accuracies, and trains with what only a GPU can show. measure: kernels
# and training against peers, bars and estimates. OUT_FOLDER gets results.json, anew after every part, logs.txt, and
# table.txt, which is printed last. A part that fails does not stop the others; the exit code is 1 then. Needs Python
# 3.11 or newer, torch, triton, numpy, pybind11, pytest, no network; packages that the machine lacks come as wheels in
# .whl, see tools/gpu_wheels.sh. Without a GPU, every part says what it skips, and does the rest on toys.
set -uo pipefail
cd "$(dirname "$0")/.."
site=
if ls .whl/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 2
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${site:+:$site}"
exec python3 tools/gpu_parts.py "$@"

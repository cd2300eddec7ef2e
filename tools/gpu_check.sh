#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes: builds, tests the kernels, measures them and a short
# training. Needs a GPU, Python 3.11 or newer, torch, triton, numpy, pybind11 and pytest; no network, nothing installed.
#
#     tools/gpu_check.sh [OUT_FOLDER]
#
# OUT_FOLDER (default gpu_check) gets logs, gpu_check.json with all results, and gpu_check.txt, the tables, which are
# printed last. A part that fails does not stop the others; the exit code is 1 then.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu_check}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD"
python3 -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device")' || exit 2

status=0
part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "$name exit $code, $((SECONDS - started)) s" | tee -a "$out/parts.txt"
    [ "$code" = 0 ] || { status=1; tail -n 30 "$out/$name.log"; }
}

: >"$out/parts.txt"
part build 60 python3 setup.py -q build_ext --inplace
part tests 140 python3 -m pytest -q --confcutdir=tests/kernels -p no:cacheprovider tests/kernels
part accuracy 30 python3 tools/benchmark_kernels.py --accuracy
part kernels 110 python3 tools/benchmark_kernels.py --rounds 10 --json "$out/kernels.json"
part training 60 python3 tools/benchmark_training.py --bf16 --json "$out/training.json"
part training_compiled 70 python3 tools/benchmark_training.py --bf16 --compile --json "$out/training_compiled.json"

python3 - "$out" <<'PYTHON'
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
names = ("kernels", "training", "training_compiled")
found = {name: json.loads(path.read_text()) for name in names if (path := out / f"{name}.json").exists()}
found["parts"] = (out / "parts.txt").read_text().splitlines()
(out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
logs = [path.read_text()[-6000:] for name in ("tests", "accuracy", *names) if (path := out / f"{name}.log").exists()]
(out / "gpu_check.txt").write_text("\n".join([*found["parts"], *logs]))
PYTHON
cat "$out/gpu_check.txt"
exit $status

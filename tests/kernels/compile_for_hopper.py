"""Compiles every configuration of the Triton kernels for sm_90, without a GPU, and prints what ptxas says as JSON:
{kernel: {"registers": n, "spills": bytes, "shared": bytes}}. To be run outside of Triton's interpreter."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lfr.kernels import triton_kernels as kernels
from megatron_lfr.kernels.triton_rows import ROW, SCORE_FLOAT, SCORE_HALF

HOPPER = GPUTarget("cuda", 90, 32)
STRIDES_AND_SIZES = {
    "row_stride": "i32", "out_stride": "i32", "out_row_stride": "i32", "coefficient_stride": "i32",
    "first_column": "i32", "columns": "i32", "width": "i32", "softcap": "fp32", "hidden_stride": "i32",
    "weight_stride": "i32", "tokens": "i32", "slices": "i32", "slice_columns": "i32", "labels": "*i64",
    "logits": "*fp32", "coefficients": "*fp32",
}  # fmt: skip


def variants() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """{name: (kernel, types that depend on the variant, constants, launch options)}"""
    found = {}
    row_options = {"num_warps": ROW.num_warps, "num_stages": 1}
    for capped, smoothed in itertools.product((False, True), repeat=2):
        flags = {"CAPPED": capped, "SMOOTHED": smoothed}
        suffix = (", capped" if capped else "") + (", smoothed" if smoothed else "")
        found[f"row_statistics{suffix}"] = (
            kernels.row_statistics, {"out": "*fp32"}, {**flags, **ROW.constants()}, row_options
        )  # fmt: skip
        for dtype in ("bf16", "fp16", "fp32"):
            found[f"row_gradient, {dtype}{suffix}"] = (
                kernels.row_gradient, {"out": f"*{dtype}"}, {**flags, **ROW.constants()}, row_options
            )  # fmt: skip
            config = SCORE_FLOAT if dtype == "fp32" else SCORE_HALF
            found[f"score_slices, {dtype}{suffix}"] = (
                kernels.score_slices,
                {"hidden": f"*{dtype}", "weight": f"*{dtype}", "out": "*fp32"},
                {**flags, "FP32_DOT": dtype == "fp32", **config.constants()},
                {"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
    return found


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]
) -> dict[str, int]:
    types = STRIDES_AND_SIZES | types
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # As at a launch with sizes that are multiples of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i" and name != "first_column"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, "-v", "-arch=sm_90a", ptx, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return {"registers": int(registers), "spills": spills, "shared": compiled.metadata.shared}


def main() -> None:
    found = {name: compile_one(*variant) for name, variant in variants().items()}
    if "--record" in sys.argv:
        path = Path(__file__).with_name("triton_record.json")
        records = json.loads(path.read_text()) if path.exists() else {}
        records[triton.__version__] = {name: numbers["registers"] for name, numbers in found.items()}
        path.write_text(json.dumps(records, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

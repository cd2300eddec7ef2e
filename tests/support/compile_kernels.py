"""Compiles the Triton kernels for GPUs that need not be there, and prints what ptxas says as JSON:
{"sm_90 kernel, variant": {"registers": n, "spills": bytes, "shared": bytes}}. To be run outside of Triton's
interpreter. For Hopper every variant, for other architectures the plainest and the largest of each kernel."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# For what is asked of ptxas. Read when triton is imported.
os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lfr.kernels import triton_kernels as kernels
from megatron_lfr.kernels.triton_rows import ROW, SCALE, SCORE_FLOAT, SCORE_HALF, SCORE_HOPPER

ARCHITECTURES = (80, 89, 90, 100, 120)
STRIDES_AND_SIZES = {
    "row_stride": "i32", "out_stride": "i32", "out_row_stride": "i32", "coefficient_stride": "i32",
    "first_column": "i32", "columns": "i32", "width": "i32", "softcap": "fp32", "hidden_stride": "i32",
    "weight_stride": "i32", "tokens": "i32", "slices": "i32", "slice_columns": "i32", "labels": "*i64",
    "logits": "*fp32", "coefficients": "*fp32", "scale": "*fp32", "count": "i32",
}  # fmt: skip
Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]
"""Kernel, types that depend on the variant, constants, launch options."""


def variants(architecture: int) -> dict[str, Variant]:
    """By name. fp16 compiles as bf16 does."""
    by_name: dict[str, Variant] = {}
    row_options = {"num_warps": ROW.num_warps, "num_stages": 1}
    flags = list(itertools.product((False, True), repeat=2)) if architecture == 90 else [(False, False), (True, True)]
    for capped, smoothed in flags:
        constants = {"CAPPED": capped, "SMOOTHED": smoothed, **ROW.constants()}
        suffix = (", capped" if capped else "") + (", smoothed" if smoothed else "")
        by_name[f"row_statistics{suffix}"] = (kernels.row_statistics, {"out": "*fp32"}, constants, row_options)
        for dtype in ("bf16", "fp32"):
            by_name[f"row_gradient, {dtype}{suffix}"] = (
                kernels.row_gradient, {"out": f"*{dtype}"}, constants, row_options
            )  # fmt: skip
            config = SCORE_FLOAT if dtype == "fp32" else SCORE_HOPPER if architecture == 90 else SCORE_HALF
            by_name[f"score_slices, {dtype}{suffix}"] = (
                kernels.score_slices,
                {"hidden": f"*{dtype}", "weight": f"*{dtype}", "out": "*fp32"},
                {"CAPPED": capped, "SMOOTHED": smoothed, "FP32_DOT": dtype == "fp32", **config.constants()},
                {"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
    by_name["scale_in_place, bf16"] = (
        kernels.scale_in_place, {"values": "*bf16"}, SCALE.constants(), {"num_warps": SCALE.num_warps}
    )  # fmt: skip
    return by_name


def compile_one(architecture: int, variant: Variant) -> dict[str, int]:
    kernel, types, constants, options = variant
    types = STRIDES_AND_SIZES | types
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # As at a launch with sizes that are multiples of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i" and name != "first_column"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (registers,) = re.findall(r"Used (\d+) registers", printed.getvalue())
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", printed.getvalue()))
    return {"registers": int(registers), "spills": spills, "shared": compiled.metadata.shared}


def main() -> None:
    compiled = {
        f"sm_{architecture} {name}": compile_one(architecture, variant)
        for architecture in ARCHITECTURES
        for name, variant in variants(architecture).items()
    }
    if "--record" in sys.argv:
        path = Path(__file__).parents[1] / "kernels" / "triton_record.json"
        records = json.loads(path.read_text()) if path.exists() else {}
        records[triton.__version__] = {name: numbers["registers"] for name, numbers in compiled.items()}
        path.write_text(json.dumps(records, indent=1) + "\n")
    print(json.dumps(compiled, indent=1))


if __name__ == "__main__":
    main()

"""Bugs of the classes that cross-entropy kernels have had, written into ours: the cases must show each of them."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import megatron_lfr.kernels
from support.cross_entropy_oracle import (
    BOUND,
    CASES,
    SCORE_PATHS,
    Case,
    Result,
    errors,
    oracle,
    path,
    run,
    score_errors,
    small_slices,
    small_tiles,
)

SOURCE = Path(megatron_lfr.kernels.__file__).parent
TORCH = ["save", "chunk", "score"]
TRITON = ["save/triton", "chunk/triton"]
SCORE = ["score/triton/fused"]
BOTH = TORCH + TRITON


class Mutant(NamedTuple):
    file: str
    good: str
    bad: str
    ways: list[str]
    """Those that run the line."""


VALID = "valid = (labels != ignore_index) & (token_weight != 0)"
NLL = "values = torch.stack((torch.where(valid, nll, 0.0), valid.to(nll.dtype)))"
MUTANTS = {
    "padding is not masked": Mutant("torch_rows", "logits[:, problem.columns :].fill_(-torch.inf)", "pass", TORCH),
    "no maximum is subtracted": Mutant(
        "torch_rows", "self._top = logits.amax(1, keepdim=True)", "self._top = 0 * logits.amax(1, keepdim=True)", TORCH
    ),
    "the maximum starts at 0": Mutant(
        "torch_rows", ".clamp_(min=torch.finfo(logits.dtype).min)", ".clamp_(min=0.0)", TORCH
    ),
    "large terms are not subtracted first": Mutant(
        "softmax", "nll = (top - target) + log_total", "nll = (top + log_total) - target", BOTH
    ),
    "chunks overwrite each other": Mutant("autograd", "add_matmul(d_weight, ", "add_matmul(None, ", BOTH),
    "the z-loss is not differentiated": Mutant("softmax", "1.0 + 2.0 * problem.z_loss * lse)", "lse * 0 + 1.0)", BOTH),
    "the softcap is not differentiated": Mutant("torch_rows", "gradient.mul_(self._slope)", "pass", TORCH),
    "smoothing forgets the label": Mutant("softmax", "+ problem.smoothing - uniform", "+ problem.smoothing", BOTH),
    "smoothing covers the padding": Mutant(
        "torch_rows",
        "logits[:, : self._problem.columns].sum(1, keepdim=True)",
        "logits.clamp(min=-9.0).sum(1, keepdim=True)",
        TORCH,
    ),
    "masked tokens are counted": Mutant("block_cross_entropy", VALID, "valid = labels != ignore_index", BOTH),
    "ignored tokens are counted": Mutant("block_cross_entropy", VALID, "valid = token_weight != 0", BOTH),
    "statistics are weighted": Mutant(
        "block_cross_entropy", NLL, NLL.replace("nll, 0.0", "nll * token_weight, 0.0"), BOTH
    ),
    "slices of the vocabulary are not merged": Mutant(
        "softmax", "targets.amax(0), (sums", "targets[0], (sums", ["score"]
    ),
    "slices keep their own maxima": Mutant("softmax", "(sums * shift.exp()).sum(0)", "sums.sum(0)", ["score"]),
    "remainders are not shifted": Mutant("softmax", "counts.unsqueeze(1) * shift", "0.0 * shift", ["score"]),
    "logits are rounded": Mutant(
        "autograd",
        "logits = matmul(hidden[rows], operand.t())",
        "logits = matmul(hidden[rows], operand.t()).bfloat16().to(compute_dtype(hidden))",
        ["save", "save/triton"],
    ),
    "Triton: the last tile is not masked": Mutant(
        "triton_kernels", 'z = tl.where(at < columns, z, -float("inf"))', "z = z", TRITON
    ),
    "Triton: the maximum starts at 0": Mutant(
        "triton_kernels", "top = tl.full((), _MIN, tl.float32)", "top = tl.zeros((), tl.float32)", TRITON
    ),
    "Triton: the sum is not rescaled": Mutant(
        "triton_kernels",
        "total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)",
        "total = total + tl.sum(tl.exp(z - new_top), 0)",
        TRITON,
    ),
    "Triton: the remainder is not rescaled": Mutant(
        "triton_kernels", "remainder += start * (top - new_top) + ", "remainder += ", TRITON
    ),
    "Triton: labels of other ranks count": Mutant(
        "triton_kernels", "(column >= 0) & (column < columns), column, -1", "column < 0, 0, -1", TRITON
    ),
    "Triton: the softcap is not differentiated": Mutant(
        "triton_kernels", "slope = 1.0 - capped * capped", "slope = 1.0", TRITON
    ),
    "Triton: padding has a gradient": Mutant(
        "triton_kernels", "tl.where(at < columns, gradient, 0.0)", "gradient", TRITON
    ),
    "Triton: the label's gradient is forgotten": Mutant(
        "triton_kernels", "tl.where(at == column, at_label, gradient)", "gradient", TRITON
    ),
    "Triton: uniform smoothing is forgotten": Mutant(
        "triton_kernels", "gradient -= uniform", "gradient -= 0.0", TRITON
    ),
    "Triton: rows overlap": Mutant("triton_rows", "out.stride(0),", "out.stride(0) // 2,", ["chunk/triton"]),
    "Triton: tiles of channels are not summed": Mutant(
        "triton_kernels",
        'tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")',
        'tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")',
        SCORE,
    ),
    "Triton: a slice takes its neighbour's columns": Mutant(
        "triton_kernels", 'z = tl.where(at[None, :] < end, z, -float("inf"))', "z = z", SCORE
    ),
    "Triton: slices forget their sum": Mutant(
        "triton_kernels",
        "total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)",
        "total = tl.sum(tl.exp(z - new_top[:, None]), 1)",
        SCORE,
    ),
    "Triton: slices forget what they shift": Mutant(
        "triton_kernels", "remainder += (start - begin) * (top - new_top) + ", "remainder += ", SCORE
    ),
    "Triton: slices scale their logits": Mutant(
        "triton_kernels", "z = tl.where(at[None, :] < end, z, ", "z = tl.where(at[None, :] < end, z * 1.001, ", SCORE
    ),
}


def copy_package(name: str, folder: Path, mutant: Mutant | None) -> None:
    """Write a copy of the package, perhaps with a bug."""
    package = folder / name
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in package.glob("*.py"):
        file.write_text(file.read_text().replace("megatron_lfr.kernels", name))
    if mutant is not None:
        file = package / f"{mutant.file}.py"
        source = file.read_text()
        assert source.count(mutant.good) == 1, f"{source.count(mutant.good)} times in {mutant.file}"
        file.write_text(source.replace(mutant.good, mutant.bad))


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mutant | None], Any]]:
    """Make copies of the package, whose kernels loop over small tiles."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (f"cross_entropy_copy_{number}" for number in itertools.count())

    def copy(mutant: Mutant | None) -> Any:
        name = next(names)
        copy_package(name, tmp_path, mutant)
        package = importlib.import_module(name)
        small_tiles(importlib.import_module(f"{package.__name__}.triton_rows"), monkeypatch)
        small_slices(importlib.import_module(f"{package.__name__}.scoring"), monkeypatch)
        return package.block_cross_entropy

    yield copy
    for name in [name for name in sys.modules if name.startswith("cross_entropy_copy_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Case, Result]]:
    return {name: (case, oracle(case)) for name, case in ((name, make()) for name, make in CASES.items())}


def worst_error(function: Any, ways: list[str], expected: dict[str, tuple[Case, Result]]) -> float:
    """Return the largest error of any case; the first one over the bound ends the search."""
    worst = 0.0
    for way, (case, right) in itertools.product(ways, expected.values()):
        options = {"function": function, "chunk_rows": 5, **path(way)}
        measured = (
            score_errors(case, right, **options) if way in SCORE_PATHS else errors(case, run(case, **options), right)
        )
        worst = max(worst, *(e if e == e else float("inf") for e in measured))
        if worst > BOUND:
            break
    return worst


def test_a_copy_without_a_bug_passes(copies: Any, expected: dict[str, tuple[Case, Result]]) -> None:
    """A copy is sound: two cases show that. That all pass in the package is asserted by the tests beside this one."""
    some = {name: expected[name] for name in ("padded vocabulary, all options", "scattered blocks")}
    assert worst_error(copies(None), ["chunk", "score", "chunk/triton", "score/triton/fused"], some) <= BOUND


FAR_ROWS = """
import sys, torch
from importlib import import_module
rows, softmax = (import_module(f"cross_entropy_copy.{name}") for name in ("triton_rows", "softmax"))
far = torch.empty(2**31 + 16).as_strided((3, 16), (2**30, 1))
far.copy_(torch.randn(3, 16))
near, labels = far.contiguous(), torch.tensor([1, 2, 3])
problem = softmax.Problem(16, 0, 16, None, False, 0.0, 0.0, 0.0)
kernels = {
    "row_statistics": lambda x: rows.TritonRows(x, labels, problem, torch.float32).statistics(),
    "score_slices": lambda x: rows.score_fused(x, torch.eye(16), labels, problem),
}
sys.exit(any(not torch.equal(kernels[name](far), kernels[name](near)) for name in sys.argv[1:]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run in the interpreter")
@pytest.mark.parametrize(
    ("kernel", "wide"),
    [("row_statistics", "tl.program_id(0).to(tl.int64)"), ("score_slices", "token.to(tl.int64)[:, None]"), (None, "")],
)
def test_offsets_of_32_bits_are_caught(kernel: str | None, wide: str, tmp_path: Path) -> None:
    """Rows 2^30 elements apart. In a process of its own, which a wrong address may end."""
    mutant = None
    if kernel is not None:
        source = (SOURCE / "triton_kernels.py").read_text()
        start = source.index(f"def {kernel}(")
        good = source[start : source.index(wide, start) + len(wide)]
        bad = good[: -len(wide)] + wide.replace(".to(tl.int64)", "")
        mutant = Mutant("triton_kernels", good, bad, [])
    copy_package("cross_entropy_copy", tmp_path, mutant)
    names = [kernel] if kernel is not None else ["row_statistics", "score_slices"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", FAR_ROWS, *names], env=environment, check=False)
    assert (done.returncode == 0) == (kernel is None)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, copies: Any, expected: dict[str, tuple[Case, Result]]) -> None:
    assert worst_error(copies(MUTANTS[name]), MUTANTS[name].ways, expected) > BOUND

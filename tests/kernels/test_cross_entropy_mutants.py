"""Bugs of the classes that cross-entropy kernels have had, written into ours: the cases must show each of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from cross_entropy_oracle import BOUND, CASES, errors, oracle, run

import megatron_lfr.kernels.block_cross_entropy  # noqa: F401

SOURCE = Path(sys.modules["megatron_lfr.kernels.block_cross_entropy"].__file__ or "").read_text()
VALID = "valid = (labels != ignore_index) & (token_weight != 0)"
MUTANTS = {
    "padding is not masked": ("logits[:, problem.columns :].fill_(-torch.inf)", "pass"),
    "no maximum is subtracted": ("top = logits.amax(1, keepdim=True)", "top = 0 * logits.amax(1, keepdim=True)"),
    "the maximum starts at 0": (".clamp_(min=torch.finfo(logits.dtype).min)", ".clamp_(min=0.0)"),
    "large terms are not subtracted first": (
        "nll = (top_all - targets.amax(0)) + log_total",
        "nll = (top_all + log_total) - targets.amax(0)",
    ),
    "chunks overwrite each other": ("self.d_weight += ", "self.d_weight = "),
    "the z-loss is not differentiated": ("1.0 + 2.0 * problem.z_loss * tokens.lse", "tokens.lse * 0 + 1.0"),
    "the softcap is not differentiated": ("d_logits.mul_(slope)", "pass"),
    "smoothing forgets the label": ("+ problem.smoothing - uniform", "+ problem.smoothing"),
    "smoothing covers the padding": (
        "logits[:, : problem.columns].sum(1, keepdim=True)",
        "logits.clamp(min=-9.0).sum(1, keepdim=True)",
    ),
    "masked tokens are counted": (VALID, "valid = labels != ignore_index"),
    "ignored tokens are counted": (VALID, "valid = token_weight != 0"),
    "statistics are weighted": ("nlls.append(tokens.nll)", "nlls.append(tokens.nll * w)"),
    "statistics are smoothed": ("nlls.append(tokens.nll)", "nlls.append(losses[-1] / w.clamp(min=1e-9))"),
    "logits are rounded": (
        "logits = _matmul(hidden[rows], weight.t())",
        "logits = _matmul(hidden[rows], weight.t()).bfloat16().to(compute_dtype(hidden))",
    ),
}


def load(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module


def worst_error(source: str) -> float:
    module = load("cross_entropy_mutant", source)
    cases = [(case, oracle(case)) for case in (make() for make in CASES.values())]
    found = [
        max(errors(case, run(case, function=module.block_cross_entropy, mode=mode, chunk_rows=5), expected))
        for case, expected in cases
        for mode in ("save", "chunk")
    ]
    return max(e if e == e else float("inf") for e in found)


def test_without_a_bug_all_cases_pass() -> None:
    assert worst_error(SOURCE) <= BOUND


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    good, bad = MUTANTS[name]
    assert SOURCE.count(good) == 1
    assert worst_error(SOURCE.replace(good, bad)) > BOUND

"""block_cross_entropy against its definition in fp64, for any shape and options."""

from __future__ import annotations

import pytest
import torch

from support.cross_entropy_oracle import PATHS, make_case, oracle, path, run

pytest.importorskip("hypothesis", reason="the machine of tools/gpu_check.sh need not have it")
from hypothesis import given, settings
from hypothesis import strategies as st


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    vocab=st.integers(1, 20),
    padding=st.integers(0, 5),
    options=st.fixed_dictionaries(
        {
            "z_loss": st.sampled_from([0.0, 0.2]),
            "label_smoothing": st.sampled_from([0.0, 0.3]),
            "logit_softcap": st.sampled_from([0.0, 3.0]),
        }
    ),
    chunk_rows=st.integers(1, 30),
    way=st.sampled_from(PATHS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)  # there may be no profile of ours, and kernels to compile
def test_equals_the_definition_for_any_shape(
    rows: int,
    length: int,
    vocab: int,
    padding: int,
    options: dict[str, float],
    chunk_rows: int,
    way: str,
    seed: int,
) -> None:
    case = make_case(rows, length, vocab=vocab + padding, vocab_size=vocab, seed=seed, **options)
    result, expected = run(case, **path(way), chunk_rows=chunk_rows), oracle(case)
    for name in ("loss", "nll_sum", "count", "d_hidden", "d_weight"):
        a, b = getattr(result, name).double(), getattr(expected, name)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, msg=name)

"""Whether runs in two layouts, or of two engines, differ by rounding alone."""

from __future__ import annotations

from pathlib import Path

import parity_matrix as matrix


def assert_close(run: Path, reference: Path) -> None:
    """Compare losses, block losses, final weights and gradient norms; the orders must be the same."""
    differences = matrix.compare(matrix.read_run(run), matrix.read_run(reference))
    assert differences["loss"] <= 1e-5
    assert differences["blocks"] <= 1e-5
    assert differences["weights"] <= 1e-4
    assert differences["grad_norm"] <= 1e-4
    assert differences["same_orders"]

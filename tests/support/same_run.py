"""Whether two runs are the same: all that they left but times, or orders, losses and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity_matrix as matrix
from safetensors.torch import load_file


def metrics_without_time(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    assert metrics_without_time(one) == metrics_without_time(two)
    for path in sorted((one / "journal").iterdir()):
        assert path.read_bytes() == (two / "journal" / path.name).read_bytes(), path.name
    assert_same_last_checkpoint(one, two)


def assert_same_last_checkpoint(one: Path, two: Path) -> None:
    """Compare the steps of the newest checkpoints, and their tensors, of the optimizer as well."""
    last = (one / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip()
    assert last == (two / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip()
    folder = f"checkpoints/iter_{int(last):07d}"
    shards = sorted((one / folder).glob("*.safetensors"))
    assert shards
    for path in shards:  # the order of the names in a file's header is random, the tensors are not
        tensors, others = load_file(path), load_file(two / folder / path.name)
        assert tensors.keys() == others.keys()
        assert any(name.startswith("optimizer.") for name in tensors)
        for name, tensor in tensors.items():
            assert tensor.numpy().tobytes() == others[name].numpy().tobytes(), name


def assert_same_bits(folder: Path, reference: Path) -> None:
    """Orders, losses, steps and weights are the same, whatever the layout of the files."""
    one, two = matrix.read_run(folder), matrix.read_run(reference)
    assert one.orders == two.orders
    np.testing.assert_array_equal(one.journal, two.journal)
    np.testing.assert_array_equal(one.steps, two.steps)
    assert all(weight.equal(two.weights[name]) for name, weight in one.weights.items())

"""The planner's model: its terms by hand, and what it predicts of published figures."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path

import pytest

from megatron_lfr.estimate.step_time import (
    CONSTANTS,
    LATENCY,
    Constants,
    Hardware,
    Layout,
    bus_gb_per_second,
    shape_of,
    step_time,
)
from megatron_lfr.model.config import MODEL_PRESETS
from megatron_lfr.parallel.devices import DEVICES

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import planner_validation as validation

MODEL = dataclasses.replace(MODEL_PRESETS["8B"], vocab_size=128256)
NODE = Hardware(DEVICES["h100"], 8)
PERFECT = Constants(matrices=1.0, attention=1.0, memory=1.0, network=1.0, overlap=0.0)
ONE = Layout(seq_length=8192, micro_batch=1, micro_batches=4)


def test_computation_is_the_models_operations_over_the_peak() -> None:
    """The count of ModelConfig, whose tests have an oracle of their own: attention's backward has five products here
    for the four of the model's count, and recomputes one."""
    time = step_time(shape_of(MODEL), ONE, NODE, PERFECT)
    tokens, peak = 4 * 8192, 989e12
    products = MODEL.flops_per_token(0) - 6.0 * MODEL.num_layers * 4096  # no keys: the diagonal alone, (0 + 1) / 2
    assert time.matrices == pytest.approx(tokens * products / peak, rel=1e-6)
    square = MODEL.flops_per_token(8192, causal=False) - MODEL.flops_per_token(0, causal=False)
    assert time.attention == pytest.approx(tokens * square / 2 * 3.5 / 3 / peak, rel=1e-6)
    assert time.tensor == time.pipeline == time.bubble == time.data == 0


def test_the_bubble_is_that_of_the_schedule() -> None:
    """Narayanan et al. 2021: (p - 1) / m of the time of all micro-batches, and a v-th of it with v stages a rank."""
    layout = dataclasses.replace(ONE, pipeline=4, micro_batches=16)
    time = step_time(shape_of(MODEL), layout, NODE, PERFECT)
    computing = time.matrices + time.attention + time.memory
    assert time.bubble == pytest.approx(computing * 3 / 16)
    more = step_time(shape_of(MODEL), dataclasses.replace(layout, stages_per_rank=2), NODE, PERFECT)
    assert more.bubble == pytest.approx(time.bubble / 2)
    assert more.pipeline == pytest.approx(2 * time.pipeline)


def test_tensor_parallelism_sends_what_its_paper_says() -> None:
    """Four all-reduces a layer and micro-batch, each twice (n - 1) / n of the hidden state, in bf16."""
    time = step_time(shape_of(MODEL), dataclasses.replace(ONE, tensor=8), NODE, PERFECT)
    size = 2 * 8192 * 4096
    all_reduce = 2 * (size * 7 / 8 / 450e9 + 7 * LATENCY)
    assert time.tensor == pytest.approx(4 * 32 * 4 * all_reduce)


def test_bandwidth_between_nodes_is_that_of_the_ports_of_a_ring() -> None:
    assert bus_gb_per_second(8, 1, NODE) == 450
    assert bus_gb_per_second(16, 1, NODE) == 400  # eight ports of 50
    assert bus_gb_per_second(4, 8, NODE) == 50  # one of each node
    assert bus_gb_per_second(16, 2, NODE) == 200


def test_sharded_weights_cost_what_is_not_hidden() -> None:
    shape = shape_of(MODEL)
    layout = dataclasses.replace(ONE, data=64, sharding="optim_grads_params")
    exposed = step_time(shape, layout, NODE, PERFECT).data
    gathered_and_summed = 4 * 8 * shape.weights * 63 / 64 / 400e9 + 4 * 3 * 32 * 63 * LATENCY
    assert exposed == pytest.approx(gathered_and_summed)
    assert step_time(shape, layout, NODE, dataclasses.replace(PERFECT, overlap=1.0)).data < 0.5 * exposed


def test_the_constants_are_a_least_error_of_the_source_that_they_are_fitted_to() -> None:
    rows = [row for row in validation.read_rows() if row.source == validation.FITTED_ON]

    def cost(constants: Constants) -> float:  # as soft_l1 in the fit
        errors = [validation.error(row, constants) for row in rows]
        return sum(2 * ((1 + abs_log(error) ** 2) ** 0.5 - 1) for error in errors)

    least = cost(CONSTANTS)
    for name, value in vars(CONSTANTS).items():
        for other in (value - 0.03, value + 0.03):
            if 0 <= other <= 1:
                assert cost(dataclasses.replace(CONSTANTS, **{name: other})) > least, (name, other)


def abs_log(error: float) -> float:
    import math

    return abs(math.log1p(error))


def test_predictions_of_the_other_sources() -> None:
    rows = validation.read_rows()
    others = [row for row in rows if row.source != validation.FITTED_ON]
    assert len(others) >= 15
    assert all(row.url.startswith("https://") for row in rows)
    assert statistics.median(abs(validation.error(row, CONSTANTS)) for row in others) <= 0.2
    titan = [row for row in others if row.source == "torchtitan" and row.shape == others[0].shape]
    right, total = validation.pairs_in_order(titan, CONSTANTS)
    assert right >= 0.8 * total > 0


def test_the_page_has_these_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text("utf-8")
    inside = page.partition(validation.BEGIN)[2].partition(validation.END)[0]
    assert inside.strip() == validation.tables(validation.read_rows(), CONSTANTS), (
        "run tools/planner_validation.py --page docs/planner.md"
    )

"""Which layers each pipeline stage has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.parallel import ParallelConfig
from megatron_lfr.parallel.pipeline import Stage, local_stages, make_stage


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int]:
    """(layers, stages), each stage with a layer at least."""
    count = draw(st.integers(1, 40))
    return draw(st.integers(count, 200)), count


@given(layouts())
def test_stages_share_the_layers_evenly_and_early_ones_take_the_rest(layout: tuple[int, int]) -> None:
    num_layers, count = layout
    stages = [make_stage(num_layers, count, index) for index in range(count)]
    layers = [layer for stage in stages for layer in range(stage.first_layer, stage.end_layer)]
    assert layers == list(range(num_layers))
    sizes = [stage.end_layer - stage.first_layer for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert [stage.index for stage in stages] == list(range(count))
    assert [stage.is_first for stage in stages] == [True] + [False] * (count - 1)
    assert [stage.is_last for stage in stages] == [False] * (count - 1) + [True]


@given(layouts(), st.integers(1, 8))
def test_ranks_take_the_stages_in_turn(layout: tuple[int, int], ranks: int) -> None:
    num_layers, count = layout
    held = [local_stages(num_layers, count, rank, ranks) for rank in range(ranks)]
    assert sorted((stage for stages in held for stage in stages), key=lambda stage: stage.index) == [
        make_stage(num_layers, count, index) for index in range(count)
    ]
    for rank, stages in enumerate(held):
        assert all(stage.index % ranks == rank for stage in stages)


@given(st.integers(1, 60), st.integers(2, 8), st.integers(1, 8))
def test_virtual_stages_come_in_whole_turns_and_are_no_larger_than_asked(
    num_layers: int, ranks: int, layers_per_stage: int
) -> None:
    config = ParallelConfig(pipeline_model_parallel_size=ranks, num_layers_per_virtual_pipeline_stage=layers_per_stage)
    count = config.num_stages(num_layers)
    stage = make_stage(num_layers, count, 0)
    assert count % ranks == 0
    assert stage.end_layer - stage.first_layer <= layers_per_stage
    # A turn less would not do.
    assert (count - ranks) * layers_per_stage < num_layers


def test_one_stage_is_the_whole_model() -> None:
    assert make_stage(3) == Stage(index=0, count=1, first_layer=0, end_layer=3)
    assert local_stages(5, 4, 1, 2) == [Stage(1, 4, 2, 3), Stage(3, 4, 4, 5)]

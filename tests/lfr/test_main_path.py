"""Where versions leave a main path and end, and what all of them cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.lfr.main_path import MainPath, branch_steps


def test_four_versions_as_in_the_paper() -> None:
    path = MainPath.of(4000, 4, 0.6)
    assert path.branch_points == [400, 1400, 2400, 3400]
    assert [path.ends_after(version) for version in (1, 2, 3, 4)] == [1000, 2000, 3000, 4000]
    assert (path.end, path.branches) == (3400, (600,) * 4)
    assert path.path_switching_steps() == 3400 + 4 * 600 == 5800
    assert (path.from_scratch_steps, path.continual_steps) == (10_000, 4000)


@pytest.mark.parametrize(("versions", "percent"), [(2, 87), (3, 70), (4, 58), (5, 49), (6, 43), (8, 34)])
def test_the_share_of_the_cost_from_scratch(versions: int, percent: int) -> None:
    path = MainPath.of(1000 * versions, versions, 0.6)
    assert round(100 * path.path_switching_steps() / path.from_scratch_steps) == percent


@pytest.mark.parametrize("share", [0.44, 0.45, 0.46])
def test_the_other_reading_of_the_main_paths_end(share: float) -> None:
    path = MainPath.of(4000, 4, share)
    assert path.path_switching_steps(to_the_end=True) == 4000 + 4 * 1000 * share
    assert 0.57 < path.path_switching_steps(to_the_end=True) / path.from_scratch_steps < 0.59


@given(st.integers(1, 12), st.integers(2, 10**6), st.integers(1, 999))
def test_steps_add_up(versions: int, steps: int, thousandths: int) -> None:
    share = thousandths / 1000
    rounded = (thousandths * steps + 500) // 1000
    if not 0 < rounded < steps:
        with pytest.raises(ValueError, match="--branch-share"):
            branch_steps(steps, share)
        return
    path = MainPath.of(versions * steps, versions, share)
    assert path.branches == (rounded,) * versions
    assert path.path_switching_steps() == versions * steps + (versions - 1) * rounded
    main = path.branch_points[-1]
    assert main + sum(path.ends_after(i) - path.leaves_after(i) for i in range(1, versions + 1)) == (
        path.path_switching_steps()
    )


def test_a_half_is_rounded_upwards_and_a_share_is_the_decimal_number() -> None:
    assert branch_steps(5, 0.5) == 3
    assert branch_steps(1000, 0.29) == 290  # 0.29 * 1000 is 289.99999999999994 in floating point
    assert branch_steps(50, 0.29) == 15  # 14.5


def test_versions_of_different_lengths() -> None:
    path = MainPath.ending([10, 30, 35], 0.5)
    assert path.branch_points == [5, 20, 32]
    assert (path.from_scratch_steps, path.continual_steps) == (75, 35)
    assert path.path_switching_steps() == 32 + 5 + 10 + 3
    assert path.path_switching_steps(to_the_end=True) == 35 + 5 + 10 + 3


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="--versions 3: must divide the run's 1000 steps"):
        MainPath.of(1000, 3, 0.6)
    with pytest.raises(ValueError, match="--version 5: the main path has versions 1 to 4"):
        MainPath.of(1000, 4, 0.6).leaves_after(5)

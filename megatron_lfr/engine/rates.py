"""The learning rate of steps that are trained already, when a run gets another length."""

from __future__ import annotations

from collections.abc import Callable

Rate = Callable[[int], float]

CLOSE = 1e-9
"""Relative difference of two rates that are the same, but for the rounding of a warm-up's length."""


def describe_other_past(before: Rate, after: Rate, steps: int) -> str | None:
    """Say which of the first `steps` steps would have had another rate; None where none would."""
    for past in range(steps):
        if abs(before(past) - after(past)) > CLOSE * before(past):
            return (
                f"the learning rate follows the run's length: step {past + 1}, which is trained, would have had "
                f"{after(past):g} instead of {before(past):g}"
            )
    return None

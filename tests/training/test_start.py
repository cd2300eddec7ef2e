"""What an engine loads at the start of a run, and that it learns of it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lfr.training.start import Start


class Given:
    """A checkpoint and an engine in one, which records the calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def load_into(self, tensors: str, allow_extra: bool = False) -> None:
        self.calls.append((tensors, allow_extra))

    def tensors(self) -> str:
        return "tensors"

    def weights(self) -> str:
        return "weights"

    def base_weights(self) -> dict[str, str]:
        return {}

    def loaded(self) -> None:
        self.calls.append("loaded")


@pytest.mark.parametrize(("kind", "call"), [("checkpoint", ("tensors", False)), ("weights", ("weights", True))])
def test_an_engine_learns_when_it_is_loaded(kind: str, call: tuple[str, bool]) -> None:
    given: Any = Given()
    Start(**{"checkpoint": None, "weights": None, kind: given}, discarded=0).load_into(given)
    assert given.calls == [call, "loaded"]

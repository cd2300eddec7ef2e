"""Marks the parts of a training step. Nobody listens while a run trains, and a mark then costs one comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

FORWARD = "forward"
BACKWARD = "backward"
REDUCTION = "gradient reduction"
OPTIMIZER = "optimizer"
MICRO_BATCHES = "all micro-batches"

Listener = Callable[[str], AbstractContextManager[object]]
"""Is called with the name of a part, and returns a context that is entered when the part begins and left at its end."""

_NOTHING: AbstractContextManager[object] = nullcontext()
_listener: Listener | None = None


def span(name: str) -> AbstractContextManager[object]:
    """Return the context in which a part of a step runs. Parts may lie in each other."""
    return _NOTHING if _listener is None else _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of all parts that run in this process during the block; one at a time can."""
    global _listener
    assert _listener is None
    _listener = listener
    try:
        yield
    finally:
        _listener = None

"""flex_attention with a backward pass on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import flex_attention

from megatron_lfr.model import attention


@contextmanager
def flex_on_cpu(backend: str | Callable[..., Any] = "aot_eager") -> Iterator[None]:
    """Compile flex_attention with a backend that has both passes on a CPU, and let it be called there."""
    compiled = functools.cache(lambda: torch.compile(flex_attention, fullgraph=True, dynamic=False, backend=backend))
    with (
        patch.object(attention, "_compiled", compiled),
        patch.object(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None),
    ):
        yield

"""What a process computes first is right, too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lfr.model import Decoder, ModelConfig

CONFIG = ModelConfig(
    num_layers=1, hidden_size=64, num_attention_heads=1, ffn_hidden_size=16, vocab_size=16, max_position_embeddings=8192
)


class FirstCalls(TorchDispatchMode):
    """Keeps how many numbers each operation was called on first."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.numbers.setdefault((func.overloadpacket.__name__, args[0].dtype), args[0].numel())
        return func(*args, **kwargs or {})


def test_no_function_is_called_first_by_several_threads() -> None:
    """An operation on one number is one thread's: what MKL settles at a function's first call is then settled."""
    with FirstCalls() as first:
        model = Decoder(CONFIG, seed=0)
    assert model.rope_cos is not None
    assert model.rope_cos.numel() > 32768  # which PyTorch spreads over threads
    for dtype in (torch.float32, torch.float64):
        for name in ("cos", "sin", "sqrt", "exp", "log", "tanh", "erf"):
            assert first.numbers[name, dtype] == 1, (name, dtype)

"""PyTorch's functions of single numbers on a CPU, settled before several threads use them."""

from __future__ import annotations

import torch

_FUNCTIONS = (torch.cos, torch.sin, torch.sqrt, torch.exp, torch.log, torch.tanh, torch.erf)


def settle_vector_math() -> None:
    """Call each function once, on one number, before a process computes with it.

    MKL, whose functions these are, chooses the code of each when it is first called. Where several threads do so at
    once, one of them may run, this once, code that gets half of the bits right (pytorch/pytorch#188792): in 14 of 4,500
    new processes of four threads, a quarter of a table of cosines, sines or roots was wrong, cosines by up to 1.5e-4.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(one)

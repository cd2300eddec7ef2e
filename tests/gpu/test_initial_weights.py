"""Initial weights do not depend on the device that draws them."""

from __future__ import annotations

import pytest
import torch

from megatron_lfr.parallel.counter_random import fill_normal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_bits() -> None:
    on_gpu, on_cpu = (torch.empty(1500, 1001, device=device) for device in ("cuda", "cpu"))
    for weights in (on_gpu, on_cpu):
        fill_normal(weights, 1.0, seed=1, name="a", first_row=7, first_column=3)
    assert torch.equal(on_gpu.cpu(), on_cpu)

"""What an engine's step takes: memory by rank, and waits of the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lfr.engine.forward_backward import model_inputs
from megatron_lfr.model.dropout import DropoutConfig
from support.engine_errors import Errors, merge
from support.engine_layouts import Layout, make_batches, make_engine, share_of


def memory(layout: Layout, share: float) -> Errors:
    """Measure what a rank keeps of each weight and of its optimizer state: `share` of all, give or take a row."""
    engine = make_engine(layout)
    batch = share_of(make_batches()[0], engine.parallel)
    engine.train_step(batch, 1e-3)
    errors: Errors = {}
    for parameter, part in zip(engine.parameters, engine.optimizer.parts, strict=True):
        rows = math.ceil(parameter.full_shape[0] * share)
        full = parameter.full_shape.numel()
        row = full // parameter.full_shape[0]
        state = engine.optimizer.state[part]
        kept = {"weights": parameter.local(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for name, tensor in kept.items():
            merge(errors, {f"{name}: rows": float(not rows - 1 <= tensor.numel() / row <= rows)})
            # FSDP2 pads its storage up to one row.
            merge(errors, {f"{name}: storage": float(tensor.untyped_storage().nbytes() > 4 * row * rows)})
    engine.eval_step(share_of(make_batches()[0], engine.parallel, engine.eval_rows)).wait()
    layers = [p for model in engine.stages for p in model.layers.parameters()]
    gathered = any(not isinstance(p, DTensor) for p in layers)
    if layout.config.sharding == "optim_grads_params":
        errors["layers left gathered"] = float(gathered)
    return errors


class _Dispatched(TorchDispatchMode):
    """Counts what would make a GPU's host wait: a number of the host that becomes a tensor, as it does where it is
    assigned to an element, a tensor's number that the host reads, and shapes that depend on values."""

    waiting = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal")
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.count += by_mask or name in self.waiting
        return function(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Counts the reads of a tensor's memory that are not dispatched on a CPU."""

    reading = ("numpy", "tolist", "__array__", "cpu", "__dlpack__", "data_ptr")
    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in self.reading
        return function(*args, **(kwargs or {}))


def host_waits(layout: Layout, dropout: DropoutConfig | None = None) -> Errors:
    """Check that, around forward and backward, nothing in a step lets the host wait for a GPU.

    Kernels look at their inputs on a CPU alone; tests/kernels has theirs."""
    engine = make_engine(layout, dropout=dropout)
    batch = share_of(make_batches()[0], engine.parallel)
    losses = engine._forward_backward.train(model_inputs(batch, engine.parallel.device, 1.0))
    recorded: Any = SimpleNamespace(train=lambda _: losses)
    engine._forward_backward = recorded
    engine.train_step(batch, 1e-3).wait()  # asks the mesh, which is on the host, where this rank stands
    with _Dispatched() as dispatched, _Called() as called:

        def count(work: Callable[[], Any]) -> tuple[int, Any]:
            dispatched.count = called.count = 0
            value = work()
            return dispatched.count + called.count, value

        ones = torch.ones(2)
        ways: list[Callable[[], Any]] = [
            lambda: ones[0].item(),
            lambda: bool(ones[0] > 0),
            lambda: ones.tolist(),
            lambda: ones.numpy(),
            lambda: ones.__setitem__(0, 1),
            lambda: ones[ones > 0],
        ]
        unseen = sum(count(way)[0] == 0 for way in ways)
        step, pending = count(lambda: engine.train_step(batch, 1e-3))
        reading, _ = count(pending.wait)
    return {"waits in a step": step, "waits that are not counted": unseen, "nothing is read": float(reading == 0)}

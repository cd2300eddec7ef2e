"""What two ranks measure of the memory that DeepSpeed's engine takes."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_lfr.config import RunConfig
from megatron_lfr.config.deepspeed_given import fill
from megatron_lfr.config.deepspeed_stated import STRATEGIES
from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.engine import build_stages
from megatron_lfr.engine.deepspeed import DeepSpeedEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.estimate.activations import MicroBatch
from megatron_lfr.estimate.deepspeed import deepspeed_memory
from megatron_lfr.model.lora import LoRAConfig
from megatron_lfr.parallel import ParallelConfig, initialize
from support.measured import sample, step_peak
from support.rank_memory_cases import MODEL as FOUR_LAYERS

MODEL = dataclasses.replace(FOUR_LAYERS, num_layers=2)
CPU = {"device": "cpu"}


@dataclass(frozen=True)
class Case:
    """A stage and what is added to its section; bytes of an activation; rows and tokens of a micro-batch."""

    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    itemsize: int = 4
    rows: int = 2
    seq_length: int = 128
    micro_batches: int = 2
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def batch(self) -> MicroBatch:
        return MicroBatch(MODEL, self.rows, self.seq_length, itemsize=self.itemsize, on_gpu=False, lora=self.lora)

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            model=MODEL,
            training=TrainingConfig(micro_batch_size=self.rows, bf16=self.itemsize == 2),
            parallel=ParallelConfig(data_parallel_sharding_strategy=STRATEGIES[self.stage]),  # type: ignore[arg-type]
        )

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
        sizes |= {"stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        return fill({"zero_optimization": {**sizes, **self.zero}}, self.config)

    def expected(self) -> int:
        """Return the estimate; on a CPU, the host's memory is the device's."""
        memory = deepspeed_memory(self.batch, self.config.parallel, self.micro_batches, 2, self.settings)
        return memory.peak + memory.host

    def measured(self) -> int:
        """Return the bytes of the tensors that exist after a step, and of the peak of the next one."""
        gc.freeze()  # what exists is not among the objects that are counted below
        parallel = initialize(self.config.parallel)
        dtype = torch.bfloat16 if self.itemsize == 2 else torch.float32
        (model,) = build_stages(MODEL, parallel, compute_dtype=dtype, lora=self.lora)
        adamw = OptimizerConfig(lr=1e-3)
        engine = DeepSpeedEngine(model, adamw, parallel, self.settings, micro_batch_size=self.rows, seed=1)
        count = self.rows * self.micro_batches
        rows = slice(parallel.data_rank * count, (parallel.data_rank + 1) * count)
        both = sample(self.batch, 2 * self.micro_batches)
        share = {name: getattr(both, name)[rows] for name in ("tokens", "labels", "loss_mask")}
        inputs = dataclasses.replace(both, rows=rows, valid_tokens=share["labels"].numel(), **share)
        engine.train_step(inputs, 1e-3).wait()
        gc.collect()
        return sum(_storages().values()) + step_peak(engine, inputs)


def _storages() -> dict[int, int]:
    """Sizes of the memory of all tensors since `gc.freeze`, by address."""
    sizes = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


_OFFLOADED = {"offload_optimizer": CPU}
_FEW: dict[str, Any] = {"rows": 1, "seq_length": 8, "micro_batches": 1}
_ADAPTERS = LoRAConfig(lora_rank=8)
CASES = {
    "ZeRO-0": Case(0),
    "ZeRO-2": Case(2),
    "ZeRO-3": Case(3),
    "ZeRO-1, bf16": Case(1, itemsize=2),
    "ZeRO-1, offloaded": Case(1, _OFFLOADED),
    "ZeRO-2, offloaded, bf16": Case(2, _OFFLOADED, itemsize=2),
    "ZeRO-3, all offloaded, bf16": Case(3, {**_OFFLOADED, "offload_param": CPU}, itemsize=2),
    # Weights and gradients are most of it.
    "ZeRO-1, few tokens": Case(1, **_FEW),
    "ZeRO-3, few tokens, bf16": Case(3, itemsize=2, **_FEW),
    "ZeRO-0, adapters": Case(0, lora=_ADAPTERS),
    "ZeRO-2, adapters, bf16": Case(2, itemsize=2, lora=_ADAPTERS),
    "ZeRO-1, adapters, few tokens": Case(1, lora=_ADAPTERS, **_FEW),
}

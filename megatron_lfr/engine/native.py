"""The native engine: our layers, PyTorch's autograd and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lfr.data.loader import Batch
from megatron_lfr.engine.base import BlockLosses, StepOutput
from megatron_lfr.engine.optimizer import OptimizerConfig, build_optimizer
from megatron_lfr.kernels import BlockStats
from megatron_lfr.kernels.block_cross_entropy import Mode
from megatron_lfr.model import Llama


class NativeEngine:
    """Trains a Llama on this process's share of each global batch, in micro-batches of `micro_batch_size` rows."""

    def __init__(self, model: Llama, config: OptimizerConfig, micro_batch_size: int, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.clip_grad = config.clip_grad
        self.parameters = list(model.parameters())
        self.optimizer = build_optimizer(config, model.named_parameters())
        self._create_optimizer_state()

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def flops_per_token(self, seq_length: int) -> float:
        return self.model.config.flops_per_token(seq_length)

    def train_step(self, batch: Batch, lr: float) -> StepOutput:
        losses, stats = [], []
        for rows in self._micro_batches(batch):
            loss, block_stats = self._forward(batch, rows, "auto")
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            stats.append(block_stats)
        loss_value = float(torch.stack(losses).sum())
        limit = self.clip_grad or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        skipped = not (math.isfinite(loss_value) and math.isfinite(grad_norm))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepOutput(loss_value, _join(stats), grad_norm, skipped)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> BlockLosses:
        return _join([self._forward(batch, rows, "score")[1] for rows in self._micro_batches(batch)])

    def tensors(self) -> dict[str, Tensor]:
        tensors = self.weights()
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}

    def _micro_batches(self, batch: Batch) -> Iterator[slice]:
        for first in range(0, len(batch.tokens), self.micro_batch_size):
            yield slice(first, first + self.micro_batch_size)

    def _forward(self, batch: Batch, rows: slice, mode: Mode) -> tuple[Tensor, BlockStats]:
        def part(tensor: Tensor) -> Tensor:
            return tensor[rows].to(self.device, non_blocking=True)

        return self.model.loss(
            part(batch.tokens),
            part(batch.labels),
            part(batch.loss_mask) / max(1, batch.valid_tokens),
            position_ids=None if batch.position_ids is None else part(batch.position_ids),
            document_ids=None if batch.document_ids is None else part(batch.document_ids),
            mode=mode,
        )

    def _create_optimizer_state(self) -> None:
        """Let AdamW make its moments now, so that a checkpoint can be loaded into them: a step with zero gradients
        at learning rate 0 changes nothing but the step counts, which are set back."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for state in self.optimizer.state.values():
            state["step"].zero_()


def _join(parts: list[BlockStats]) -> BlockLosses:
    return BlockLosses(
        torch.cat([part.nll_sum for part in parts]).numpy(force=True),
        torch.cat([part.count for part in parts]).numpy(force=True),
    )

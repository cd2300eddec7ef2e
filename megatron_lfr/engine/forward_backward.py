"""Runs forward and backward of a step's micro-batches: one after the other, or through a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.model.decoder import Decoder, Loss
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.spans import BACKWARD, FORWARD, span

Inputs = dict[str, Tensor]


class ForwardBackward(Protocol):
    """Runs this data-parallel rank's rows of a batch; returns the micro-batches' losses on ranks that compute them."""

    def train(self, inputs: Inputs) -> list[Loss]:
        """Run forward and backward; gradients are added to those of the weights."""
        ...

    def evaluate(self, inputs: Inputs) -> list[Loss]:
        """Run forward only, without gradients."""
        ...


def model_inputs(
    batch: Batch, device: torch.device, scale: float | Tensor, sample_keys: Tensor | None = None
) -> Inputs:
    """Return the arguments of a model's forward; `token_weight` is the loss mask times `scale`. sample_keys: of the
    batch's rows, where training drops."""
    inputs = {"x": batch.tokens, "labels": batch.labels, "token_weight": batch.loss_mask}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.document_ids is not None:
        inputs["document_ids"] = batch.document_ids
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    inputs["token_weight"] = inputs["token_weight"] * scale
    if sample_keys is not None:
        inputs["sample_keys"] = sample_keys
    return inputs


class Synchronization(Protocol):
    """Decides when data-parallel ranks exchange gradients and weights in a step of several micro-batches."""

    def before_micro_batch(self, is_last: bool) -> None:
        """Prepare for the forward of a micro-batch; `is_last`: it is the last of its step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch's loss, a scalar: gradients are added to the weights'."""
        ...


@dataclass
class MicroBatchLoop:
    """Runs a single stage: forward and backward of one micro-batch after the other."""

    model: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """A Decoder, or what calls it."""
    micro_batch_size: int
    synchronization: Synchronization

    def train(self, inputs: Inputs) -> list[Loss]:
        parts = self._split(inputs)
        losses = []
        for number, part in enumerate(parts, 1):
            self.synchronization.before_micro_batch(is_last=number == len(parts))
            with span(FORWARD):
                loss = Loss(*self.model(**part))
            with span(BACKWARD):
                self.synchronization.backward(loss.loss)
            losses.append(loss)
        return losses

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> list[Loss]:
        return [Loss(*self.model(**part)) for part in self._split(inputs)]

    def _split(self, inputs: Inputs) -> list[Inputs]:
        rows = range(0, len(inputs["labels"]), self.micro_batch_size)
        return [{n: t[first : first + self.micro_batch_size] for n, t in inputs.items()} for first in rows]


class Pipeline:
    """Runs several stages: PyTorch's schedules send activations and gradients between the pipeline's ranks."""

    def __init__(
        self,
        stages: Sequence[Decoder],
        micro_batch_size: int,
        seq_length: int,
        parallel: ParallelState,
    ) -> None:
        self._losses: list[Loss] = []
        self._holds_first = stages[0].stage.is_first
        self._micro_batch_size = micro_batch_size
        options: dict[str, Any] = {"loss_fn": self._collect, "scale_grads": False}

        @functools.cache
        def schedule(purpose: str, micro_batches: int) -> Any:
            wrapped = [_pipeline_stage(model, micro_batch_size, seq_length, parallel) for model in stages]
            schedules: dict[str, Callable[[], Any]] = {
                "1f1b": lambda: Schedule1F1B(wrapped[0], micro_batches, **options),
                "gpipe": lambda: ScheduleGPipe(wrapped[0], micro_batches, **options),
                "interleaved": lambda: ScheduleInterleaved1F1B(wrapped, micro_batches, **options),  # type: ignore[arg-type]
            }
            return schedules[parallel.config.schedule]()

        # A schedule prepares its stages at its first run. In torch 2.11, one that has evaluated first cannot train.
        self._schedule = schedule

    def train(self, inputs: Inputs) -> list[Loss]:
        return self._run(self._scheduled("training", inputs).step, inputs)

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> list[Loss]:
        return self._run(self._scheduled("evaluation", inputs).eval, inputs)

    def _scheduled(self, purpose: str, inputs: Inputs) -> Any:
        """Return the schedule of as many micro-batches as these rows have."""
        return self._schedule(purpose, len(inputs["labels"]) // self._micro_batch_size)

    def _run(self, run: Callable[..., object], inputs: Inputs) -> list[Loss]:
        self._losses = []
        x = inputs.pop("x")
        run(*([x] if self._holds_first else []), target=inputs["labels"], return_outputs=False, **inputs)
        losses, self._losses = self._losses, []
        return losses

    def _collect(self, output: tuple[Tensor, Tensor, Tensor], _: Tensor) -> Tensor:
        """Keep the losses of a micro-batch; the last stage calls this for each, in order."""
        self._losses.append(Loss(*output))
        return output[0]


class _Stage(PipelineStage):
    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with span(FORWARD):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with span(BACKWARD):
            return super().backward_one_chunk(*args, **kwargs)


def _pipeline_stage(model: Decoder, rows: int, seq_length: int, parallel: ParallelState) -> PipelineStage:
    """Wrap a stage together with the shapes of its inputs and outputs, so that no trial run has to find them."""
    tokens = rows * seq_length // parallel.config.context_parallel_size
    if model.tp.sequence:
        tokens //= model.tp.size

    def meta(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype, requires_grad=requires_grad)

    hidden = meta(tokens, model.config.hidden_size, dtype=model.compute_dtype, requires_grad=True)
    loss = (meta(requires_grad=True), meta(rows), meta(rows))
    return _Stage(
        model,
        model.stage.index,
        model.stage.count,
        parallel.device,
        input_args=meta(rows, seq_length, dtype=torch.int64) if model.stage.is_first else hidden,
        output_args=loss if model.stage.is_last else hidden,
        group=parallel.pipeline_group,
    )

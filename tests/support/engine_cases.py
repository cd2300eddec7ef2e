"""What the ranks of the engine's tests run: each case compares with the oracle and returns its errors by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lfr.config.training import TrainingConfig
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.loader import Batch, Loader
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.engine import build as engine_build
from megatron_lfr.engine import build_stages, shard_stages
from megatron_lfr.engine.base import BlockLosses, StepLosses
from megatron_lfr.engine.forward_backward import model_inputs
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.lora import LoRAConfig, add_adapters, init_adapters
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.parallel import ParallelConfig, ParallelState, initialize
from megatron_lfr.training.stopping import Stopping
from support.engine_oracle import GlobalBatch, Oracle, Step
from support.flex_on_cpu import flex_on_cpu
from support.lora_oracle import LoRAOracle, random_b
from support.waiting import LIMIT

Errors = dict[str, float]
ROWS, LENGTH, SEED = 8, 16, 3
RATES = (1e-2, 5e-3, 1e-2)
TOY = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=46,  # does not divide evenly over four ranks, nor its half over two
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    max_position_embeddings=LENGTH,
    init_method_std=0.1,
)
# With a large epsilon, a wrong scale of the gradients shows in the weights.
ADAMW = OptimizerConfig(weight_decay=0.1, adam_beta2=0.95, adam_eps=1e-3)
ADAPTERS = LoRAConfig(lora_rank=3, lora_alpha=6.0)
PARTLY = dataclasses.replace(ADAPTERS, lora_target="v,down")
RITE = dataclasses.replace(ADAMW, optimizer="lora-rite", clip_grad=0.0, rite_clip=0.05)
CAPPED = dataclasses.replace(TOY, final_logit_softcapping=1.0)
LOSS = LossConfig(z_loss_coeff=0.02, label_smoothing=0.1)
DROPOUT = DropoutConfig(attention_dropout=0.2, hidden_dropout=0.1)
BOUNDS = {"loss": 1e-5, "nll": 1e-5, "grad_norm": 1e-5, "weights": 1e-4, "eval": 1e-5, "bf16 loss": 3e-2}
"""Of errors; quantities that are not here are exact: 0."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks, rows of a micro-batch, and the layout's flags."""

    ranks: int
    micro_batch: int
    flags: dict[str, Any]

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(**self.flags)


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SHARDING, COPIES = "data_parallel_sharding_strategy", "num_distributed_optimizer_instances"
TP2_SP: dict[str, Any] = {TP: 2, "sequence_parallel": True}
LAYOUTS = {
    **{f"one rank, micro-batch {rows}": Layout(1, rows, {}) for rows in (1, 2, 8)},
    "DP2": Layout(2, 2, {}),
    "DP2 optim": Layout(2, 1, {SHARDING: "optim"}),
    "DP2 optim_grads": Layout(2, 2, {SHARDING: "optim_grads"}),
    "DP2 optim_grads_params": Layout(2, 4, {SHARDING: "optim_grads_params"}),
    "DP2 optim_grads_params, micro-batch 1": Layout(2, 1, {SHARDING: "optim_grads_params"}),
    "TP2": Layout(2, 4, {TP: 2}),
    "TP2 SP": Layout(2, 2, TP2_SP),
    "PP2 1f1b": Layout(2, 2, {PP: 2}),
    "PP2 gpipe": Layout(2, 4, {PP: 2, "pipeline_schedule": "gpipe"}),
    "PP2 interleaved": Layout(2, 2, {PP: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "CP2": Layout(2, 2, {CP: 2}),
    "TP2 PP2": Layout(4, 2, {TP: 2, PP: 2}),
    "TP2 PP2 SP": Layout(4, 1, {**TP2_SP, PP: 2}),
    "DP2 CP2": Layout(4, 2, {CP: 2}),
    "DP2 CP2 optim": Layout(4, 4, {CP: 2, SHARDING: "optim"}),
    "PP2 DP2": Layout(4, 2, {PP: 2}),
    "PP2 DP2 optim": Layout(4, 1, {PP: 2, SHARDING: "optim"}),
    "TP2 DP2 SP optim_grads_params": Layout(4, 2, {**TP2_SP, SHARDING: "optim_grads_params"}),
    "DP4 in two copies": Layout(4, 2, {SHARDING: "optim_grads_params", COPIES: 2}),
}


def make_batches(documents: bool = False) -> list[GlobalBatch]:
    """Three steps: rows of padding here and there; the second half of the rows masked; the first half masked."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for number, masked in enumerate(([2, 7], [4, 5, 6, 7], [0, 1, 2, 3])):
        tokens = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.3, 1.0, ROWS)[:, None]).float()
        mask[masked] = 0
        # The last step's masked rows are blocks of which no token counts, the others' padding.
        padding = masked if number < 2 else []
        ids = [-1 if row in padding else 10 * number + row for row in range(ROWS)]
        lengths = None
        if documents:
            cuts = [torch.randint(1, LENGTH, (3,), generator=generator).unique().tolist() for _ in range(ROWS)]
            lengths = [[b - a for a, b in zip([0, *c], [*c, LENGTH], strict=True)] for c in cuts]
        batches.append(GlobalBatch(tokens[:, :-1], tokens[:, 1:], mask, ids, lengths, step=number))
    return batches


def share_of(batch: GlobalBatch, parallel: ParallelState, length: int | None = None) -> Batch:
    """Return this rank's share, as the loader would make it, of the first `length` rows."""
    share = (length or ROWS) // parallel.data_parallel_size
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    position_ids = document_ids = None
    if batch.documents is not None:
        mine = batch.documents[rows]
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in mine])
        document_ids = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in mine])
    return Batch(
        step=batch.step,
        block_ids=np.array(batch.block_ids[:length]),
        rows=rows,
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        loss_mask=batch.mask[rows].clone(),
        position_ids=position_ids,
        document_ids=document_ids,
        valid_tokens=int(batch.mask[rows].sum()),
    )


def make_engine(
    layout: Layout, adamw: OptimizerConfig = ADAMW, seed: int | None = SEED, **options: Any
) -> NativeEngine:
    parallel = initialize(layout.config)
    config = options.pop("config", TOY)
    layout.config.check_batches(
        config.num_layers, LENGTH, layout.micro_batch, ROWS // parallel.data_parallel_size // layout.micro_batch
    )
    return NativeEngine(
        shard_stages(build_stages(config, parallel, dropout_seed=SEED, **options), parallel, seed),
        adamw,
        parallel,
        seq_length=LENGTH,
        micro_batch_size=layout.micro_batch,
        global_batch_size=ROWS,
    )


def block_error(blocks: BlockLosses, nll_sum: Tensor, count: Tensor) -> tuple[float, float]:
    """Largest errors of losses, in nats a token, and of counts; inf for a loss that is no number."""
    sums, counts = torch.from_numpy(blocks)
    errors = (sums.double() - nll_sum).abs() / count.clamp(min=1)
    return float(errors.nan_to_num(nan=math.inf).max()), float((counts - count).abs().max())


def step_errors(output: StepLosses, expected: Step) -> Errors:
    nll, count = block_error(output.wait(), expected.nll_sum, expected.count)
    return {
        "loss": abs(output.loss - expected.loss),
        "nll": nll,
        "count": count,
        "grad_norm": abs(output.grad_norm / expected.grad_norm - 1),
        "skipped": float(output.skipped),
    }


def weight_error(engine: NativeEngine, oracle: Oracle) -> float:
    """Relative L2 distance of the worst weight of this rank's stages."""
    errors = []
    for name, weight in engine.weights().items():
        assert isinstance(weight, DTensor)
        expected = oracle.weights[name.removeprefix("model.")].detach()
        errors.append(float((weight.full_tensor().double() - expected).norm() / expected.norm()))
    return max(errors)


def merge(errors: Errors, more: Errors) -> None:
    """Keep the larger of each error; one that is no number counts as infinite."""
    for name, value in more.items():
        errors[name] = max(errors.get(name, 0.0), math.inf if math.isnan(value) else value)


def eval_error(engine: NativeEngine, oracle: Oracle, batch: GlobalBatch) -> Errors:
    nll_sum, count = oracle.evaluate(batch)
    rows = engine.eval_rows
    nll, counts = block_error(
        engine.eval_step(share_of(batch, engine.parallel, rows)).wait(), nll_sum[:rows], count[:rows]
    )
    return {"eval": nll, "eval count": counts}


def snapshot(engine: NativeEngine) -> dict[str, Tensor]:
    """Return the bits of this rank's part of all that training continues from."""
    return bits(engine.tensors())


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: part.detach().clone().view(torch.int32) for name, part in local.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """0 where both hold the same bits."""
    return float(before.keys() != after.keys() or any(not torch.equal(t, after[n]) for n, t in before.items()))


def follow(
    layout: Layout, documents: bool = False, adamw: OptimizerConfig = ADAMW, steps: int = 3, **options: Any
) -> Errors:
    """Train, and compare each step and the weights after it."""
    engine = make_engine(layout, adamw, **options)
    oracle = Oracle(options.get("config", TOY), SEED, adamw, options.get("loss"), options.get("dropout"))
    errors: Errors = {}
    for batch, lr in zip(make_batches(documents)[:steps], RATES, strict=False):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        merge(errors, step_errors(output, oracle.step(batch, lr)))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def dropped(layout: Layout, **options: Any) -> Errors:
    """Dropout: the masks of the oracle in training, none in an evaluation, and not the losses of a run without."""
    errors = follow(layout, dropout=DROPOUT, **options)
    batch = make_batches()[0]
    engine, plain = make_engine(layout, dropout=DROPOUT, **options), make_engine(layout)
    merge(errors, eval_error(engine, Oracle(TOY, SEED, ADAMW), batch))
    losses = [e.train_step(share_of(batch, e.parallel), RATES[0]).loss for e in (engine, plain)]
    return errors | {"drops nothing": float(abs(losses[0] - losses[1]) < 1e-3)}


def evaluate(layout: Layout) -> Errors:
    """Take steps with evaluations between them: both are right, and have the same bits as without evaluations."""
    batches = make_batches()
    plain, engine, oracle = make_engine(layout), make_engine(layout), Oracle(TOY, SEED, ADAMW)
    errors: Errors = {}
    for number, (batch, lr) in enumerate(zip(batches, RATES, strict=True)):
        before = snapshot(engine)
        merge(errors, eval_error(engine, oracle, batches[number - 1]))
        merge(errors, {"changed by an evaluation": changed(before, snapshot(engine))})
        outputs = [e.train_step(share_of(batch, e.parallel), lr) for e in (plain, engine)]
        merge(errors, step_errors(outputs[0], oracle.step(batch, lr)))
        merge(errors, {"other loss after an evaluation": float(outputs[0].loss != outputs[1].loss)})
    merge(errors, {"other weights after evaluations": changed(snapshot(plain), snapshot(engine))})
    merge(errors, {"weights": weight_error(plain, oracle)})
    return errors


def minimised(layout: Layout) -> Errors:
    """Take steps on capped logits with all that the loss can have, which no recorded and no evaluated loss has."""
    batch, other = make_batches()[:2]
    plain, engine = make_engine(layout, config=CAPPED), make_engine(layout, config=CAPPED, loss=LOSS)
    oracle = Oracle(CAPPED, SEED, ADAMW, LOSS)
    errors = eval_error(engine, oracle, other)
    outputs = [e.train_step(share_of(batch, e.parallel), RATES[0]) for e in (plain, engine)]
    losses = [output.wait() for output in outputs]
    errors["other block losses"] = float((losses[0][0] != losses[1][0]).any())
    errors["the same loss"] = float(abs(outputs[0].loss - outputs[1].loss) < 0.1)
    merge(errors, step_errors(outputs[1], oracle.step(batch, RATES[0])))
    merge(errors, eval_error(engine, oracle, other))
    merge(
        errors, step_errors(engine.train_step(share_of(other, engine.parallel), RATES[1]), oracle.step(other, RATES[1]))
    )
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def load(layout: Layout) -> Errors:
    """Write another engine's state into an engine's tensors, once before it has computed anything and once after."""
    batches = make_batches()
    engine, donor, oracle = make_engine(layout), make_engine(layout, seed=9), Oracle(TOY, 9, ADAMW)
    errors: Errors = {}
    for number in range(2):
        donor.train_step(share_of(batches[number], donor.parallel), RATES[number])
        oracle.step(batches[number], RATES[number])
        given = donor.tensors()
        for name, tensor in engine.tensors().items():
            source = given[name]
            if isinstance(tensor, DTensor):
                assert isinstance(source, DTensor)
                tensor.to_local().copy_(source.to_local())
            else:
                tensor.copy_(source)
        merge(errors, eval_error(engine, oracle, batches[1 - number]))
    expected = oracle.step(batches[2], RATES[2])
    merge(errors, step_errors(engine.train_step(share_of(batches[2], engine.parallel), RATES[2]), expected))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def not_finite(layout: Layout, rank: int, what: str) -> Errors:
    """Put in a value on one rank that is not finite: all leave out the step, and the next one is right."""
    first, second, _ = make_batches()
    engine, oracle = make_engine(layout), Oracle(TOY, SEED, ADAMW)
    output = engine.train_step(share_of(first, engine.parallel), RATES[0])
    errors = step_errors(output, oracle.step(first, RATES[0]))
    batch = share_of(first, engine.parallel)
    parameter = next(p for p in engine.parameters if p.name.endswith("qkv.weight"))
    weight = parameter.local()
    kept = float(weight[0, 0])
    finish = engine.gradients.finish

    def finish_with_infinity() -> None:
        finish()
        parameter.local_grad()[0, 0] = math.inf

    if dist.get_rank() == rank:
        if what == "weight":
            weight[0, 0] = math.nan
        elif what == "mask":
            batch.loss_mask[0, 0] = math.nan
        else:
            engine.gradients.finish = finish_with_infinity  # type: ignore[method-assign]
    before = snapshot(engine)
    output = engine.train_step(batch, RATES[1])
    output.wait()
    errors |= {
        "not skipped": float(not output.skipped),
        "loss hides it": float(math.isnan(output.loss) == (what == "gradient")),
        "norm hides it": float(math.isfinite(output.grad_norm)),
        "changed by a skipped step": changed(before, snapshot(engine)),
    }
    if what == "weight":
        weight[0, 0] = kept
    engine.gradients.finish = finish  # type: ignore[method-assign]
    expected = oracle.step(second, RATES[1])
    merge(errors, step_errors(engine.train_step(share_of(second, engine.parallel), RATES[1]), expected))
    merge(errors, {"weights": weight_error(engine, oracle)})
    return errors


def stop(layout: Layout) -> Errors:
    """Each rank in turn asks to stop, then for a checkpoint, while a step computes; then none does."""
    engine = make_engine(layout)
    batch = share_of(make_batches()[0], engine.parallel)
    group = engine.parallel.control_group

    def agreed(number: int | None = None) -> tuple[str | None, bool]:
        stopping = Stopping(TrainingConfig(exit_interval=7), group)
        wait = stopping.ask(7 if number == 0 else 8, save=number == 1)
        engine.train_step(batch, 1e-3)
        saves = wait()
        return stopping.reason, saves

    errors = {}
    for asking in range(layout.ranks):
        mine = dist.get_rank() == asking
        reason = "--exit-interval 7" if mine else "another rank was asked to stop"
        errors[f"rank {asking} not heard"] = float(agreed(0 if mine else None) != (reason, False))
        errors[f"rank {asking} not saved for"] = float(agreed(1 if mine else None) != (None, True))
    errors["stopped unasked"] = float(agreed() != (None, False))
    return errors


def clipping(layout: Layout, limit: float) -> Errors:
    """Clipped at `limit`, 0 for not at all; Adam must not hide a wrong scale."""
    adamw, other = (dataclasses.replace(ADAMW, clip_grad=value) for value in (limit, 0.0 if limit else 0.05))
    errors = follow(layout, adamw=adamw)
    right, wrong = Oracle(TOY, SEED, adamw), Oracle(TOY, SEED, other)
    for batch, lr in zip(make_batches(), RATES, strict=True):
        norms = right.step(batch, lr).grad_norm, wrong.step(batch, lr).grad_norm
        merge(errors, {"nothing to clip": float(min(norms) < 0.1)})
    distances = [float((w - wrong.weights[n]).norm() / w.norm()) for n, w in right.weights.items()]
    errors["clipping does not show"] = float(max(distances) < 100 * BOUNDS["weights"])
    return errors


def bf16(layout: Layout) -> Errors:
    """Layers compute in bf16, weights and the optimizer's state stay fp32."""
    engine = make_engine(layout, compute_dtype=torch.bfloat16)
    oracle = Oracle(TOY, SEED, ADAMW)
    errors = []
    for batch, lr in zip(make_batches(), RATES, strict=True):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        errors.append(step_errors(output, oracle.step(batch, lr)))
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return {
        "bf16 loss": max(error["loss"] for error in errors),
        "count": max(error["count"] for error in errors),
        "not computed in bf16": float(errors[0]["loss"] < 1e-6),
        "weights not fp32": float(any(p.local().dtype != torch.float32 for p in engine.parameters)),
        "state not fp32": float(any(value.dtype != torch.float32 for value in states)),
        "no state": float(len(states) != 3 * len(engine.parameters)),
    }


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


def compiled(layout: Layout, follow: Callable[..., Errors], **options: Any) -> Errors:
    """Compiled layers, two for speed; a layer is one graph."""
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    config = dataclasses.replace(CAPPED, num_layers=2)
    errors = follow(layout, steps=2, config=config, loss=LOSS, compile_layers=True, **options)
    counters = torch._dynamo.utils.counters
    errors["graph breaks"] = float(sum(counters["graph_break"].values()))
    errors["not compiled"] = float(counters["stats"]["unique_graphs"] < 1)
    return errors


def flex(layout: Layout, documents: bool = True, **options: Any) -> Errors:
    """Attention by flex_attention's block masks."""
    with flex_on_cpu():
        return follow(layout, documents=documents, steps=2, attention_backend="flex", **options)


def adapted(
    layout: Layout, adamw: OptimizerConfig = ADAMW, lora: LoRAConfig = ADAPTERS, steps: int = 2, **options: Any
) -> Errors:
    """Train adapters, of which B is not zero, so that all gradients show; nothing else of the model changes."""
    with random_b():
        engine = make_adapted(layout, lora, adamw, **options)
        oracle = LoRAOracle(options.get("config", TOY), SEED, adamw, lora, options.get("loss"))
    base = bits(engine.base_weights())
    errors: Errors = {"adapters at the start": weight_error(engine, oracle)}
    for batch, lr in zip(make_batches()[:steps], RATES, strict=False):
        output = engine.train_step(share_of(batch, engine.parallel), lr)
        merge(errors, step_errors(output, oracle.step(batch, lr)))
    merge(errors, {"weights": weight_error(engine, oracle), "changed base": changed(base, bits(engine.base_weights()))})
    return errors | {"base in the checkpoint": float(bool(base.keys() & engine.tensors().keys()))}


def supervised(layout: Layout, adapters: bool = False) -> Errors:
    """Train and evaluate on blocks of records, of which the loader masks the prompts; one prompt fills a block, which
    is left out."""
    rng = np.random.default_rng(5)
    lengths = [(int(rng.integers(1, 20)), int(rng.integers(1, 9))) for _ in range(30)]
    lengths[4] = (3 * LENGTH, 1)
    records = [(rng.integers(0, 49, prompt + answer), [0] * prompt + [1] * (answer + 1)) for prompt, answer in lengths]
    flat = torch.tensor([token for tokens, _ in records for token in [*tokens.tolist(), 49]])
    mask = torch.tensor([float(counts) for _, counts in records for counts in counts])
    starts = [s for s in range(0, len(flat) - LENGTH, LENGTH) if mask[s + 1 : s + LENGTH + 1].any()]
    rows = [(flat[s : s + LENGTH], flat[s + 1 : s + LENGTH + 1], mask[s + 1 : s + LENGTH + 1]) for s in starts]
    with TemporaryDirectory() as folder, random_b():
        with IndexedDatasetWriter(Path(folder, "c"), np.uint16, masked=True) as writer:
            for tokens, counts in records:
                writer.add_document(np.append(tokens, 49), np.array(counts))
        source = BlockDataset([Path(folder, "c")], LENGTH, "1").train
        engine = make_adapted(layout, ADAPTERS, ADAMW) if adapters else make_engine(layout)
        oracle = LoRAOracle(TOY, SEED, ADAMW, ADAPTERS) if adapters else Oracle(TOY, SEED, ADAMW)
        parallel = engine.parallel
        loader = Loader(source, rank=parallel.data_rank, ranks=parallel.data_parallel_size)
        errors = {"other blocks": float(source.num_blocks != len(rows) or source.left_out == [0])}
        for step, lr in enumerate(RATES[:2]):
            ids = [*range(step * ROWS, (step + 1) * ROWS - 1), -1]
            tokens, labels, counted = (torch.stack([rows[i][part] for i in ids]) for part in range(3))
            counted[-1] = 0
            batch = GlobalBatch(tokens, labels, counted, ids, step=step)
            output = engine.train_step(loader.load(step, ids), lr)
            merge(errors, step_errors(output, oracle.step(batch, lr)))
            evaluated = engine.eval_step(loader.load(step, ids[: engine.eval_rows])).wait()
            expected = [values[: engine.eval_rows] for values in oracle.evaluate(batch)]
            nll, count = block_error(evaluated, expected[0], expected[1])
            merge(errors, {"eval": nll, "eval count": count})
    return errors | {"weights": weight_error(engine, oracle)}


def make_adapted(layout: Layout, lora: LoRAConfig, *arguments: Any, **options: Any) -> NativeEngine:
    engine = make_engine(layout, *arguments, lora=lora, **options)
    for stage in engine.stages:
        init_adapters(stage, SEED)
    return engine


def adapted_in_bf16(layout: Layout) -> Errors:
    """Compare a frozen base in bf16 with one in fp32, which the layers round: the same bits; adapters stay fp32."""
    engine = make_adapted(layout, ADAPTERS, compute_dtype=torch.bfloat16)
    with patch.object(
        engine_build, "add_adapters", lambda model, lora, dtype: add_adapters(model, lora, torch.float32)
    ):
        other = make_adapted(layout, ADAPTERS, compute_dtype=torch.bfloat16)
    oracle, errors = Oracle(TOY, SEED, ADAMW), []
    for batch in make_batches()[:1]:
        outputs = [e.train_step(share_of(batch, e.parallel), 1e-2) for e in (engine, other)]
        errors.append(abs(outputs[0].loss - oracle.step(batch, 1e-2).loss))
    dtypes = [{weight.dtype for weight in e.base_weights().values()} for e in (engine, other)]
    return {
        "bf16 loss": max(errors),
        "other adapters than with fp32": changed(snapshot(engine), snapshot(other)),
        "base not in bf16": float(dtypes != [{torch.bfloat16}, {torch.float32}]),
        "adapters not fp32": float(any(tensor.dtype != torch.float32 for tensor in engine.tensors().values())),
    }


Case = tuple[int, Callable[[], Errors]]


def _cases() -> dict[str, Case]:
    """Name → (ranks, case)."""
    cases: dict[str, Case] = {}

    def add(kind: str, name: str, case: Callable[..., Errors], *more: Any, **options: Any) -> None:
        layout = LAYOUTS[name]
        cases[f"{kind}: {name}"] = layout.ranks, lambda: case(layout, *more, **options)

    untied = dataclasses.replace(TOY, untie_embeddings_and_output_weights=True)
    for name in LAYOUTS:
        add("steps and evaluations", name, evaluate)
    # One layout for each way in which tokens, vocabulary and layers are spread, and two of several; how often gradients
    # are exchanged, and what is sharded, does not meet these options.
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2", "TP2 SP", "PP2 1f1b", "CP2"):
        add("z-loss, smoothing and a cap", name, minimised)
    for name in ("PP2 interleaved", "TP2 PP2 SP", "DP2 CP2 optim"):
        add("z-loss, smoothing and a cap", name, minimised)
    for name in ("one rank, micro-batch 8", "DP2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "TP2 PP2"):
        add("loading", name, load)
    add("steps with AdamW's defaults", "one rank, micro-batch 8", follow, adamw=OptimizerConfig())
    add("steps, untied", "PP2 1f1b", follow, config=untied)
    add("steps, untied", "TP2 SP", follow, config=untied)
    for name in ("one rank, micro-batch 2", "CP2", "PP2 1f1b", "PP2 interleaved", "TP2 SP", "DP2 CP2", "TP2 PP2 SP"):
        add("documents", name, follow, documents=True)
    for name in ("DP2 optim_grads_params", "CP2", "PP2 interleaved", "TP2 SP"):
        add("documents without a dense mask", name, flex)
    for name in (
        "one rank, micro-batch 2",
        "DP2 optim_grads_params, micro-batch 1",
        "TP2 SP",
        "PP2 interleaved",
        "CP2",
    ):
        add("dropout", name, dropped)
    for name in ("TP2 PP2 SP", "DP2 CP2 optim"):
        add("dropout", name, dropped)
    add("dropout, selective recomputation", "CP2", dropped, recompute_granularity="selective")
    add("dropout, full recomputation", "TP2 SP", dropped, recompute_granularity="full")
    add("dropout within documents", "one rank, micro-batch 2", follow, documents=True, dropout=DROPOUT)
    add("dropout within documents", "DP2 CP2", follow, documents=True, dropout=DROPOUT)
    add("a context-parallel rank's chunks in one", "CP2", flex, documents=False, recompute_granularity="selective")
    for name in ("DP2", "DP2 optim_grads_params", "TP2 SP", "CP2", "PP2 1f1b", "TP2 PP2", "DP2 CP2 optim"):
        last = LAYOUTS[name].ranks - 1
        add("NaN in a weight of the last rank", name, not_finite, last, "weight")
        add("stop", name, stop)
    add("NaN in a weight of the first rank", "PP2 1f1b", not_finite, 0, "weight")
    for name in ("DP2 optim", "PP2 DP2"):
        add("NaN in a mask", name, not_finite, LAYOUTS[name].ranks - 1, "mask")
    for name in ("DP2 optim", "TP2", "PP2 1f1b"):
        add("infinite gradient", name, not_finite, 1, "gradient")
    for name in ("one rank, micro-batch 8", "TP2 SP", "PP2 1f1b", "DP2 CP2 optim"):
        add("clipped at 0.05", name, clipping, 0.05)
    for name in ("one rank, micro-batch 8", "DP2 optim"):
        add("not clipped", name, clipping, 0.0)
    for name in ("DP2 optim", "TP2 SP"):
        add("bf16", name, bf16)
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "CP2"):
        add("waits of the host", name, host_waits)
    # Layouts in which a factor's gradient, or its optimizer's step, is put together in another way.
    for name in ("one rank, micro-batch 2", "DP2 optim", "DP2 optim_grads_params", "TP2 SP", "PP2 interleaved", "CP2"):
        add("adapters", name, adapted)
    for name in ("TP2 PP2 SP", "TP2 DP2 SP optim_grads_params"):
        add("adapters", name, adapted)
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "CP2"):
        add("adapters by LoRA-RITE", name, adapted, adamw=RITE)
    for name in ("TP2 PP2 SP", "TP2 DP2 SP optim_grads_params"):
        add("adapters by LoRA-RITE", name, adapted, adamw=RITE)
    for name in ("TP2 SP", "PP2 1f1b"):
        add("adapters of some modules, recomputed", name, adapted, lora=PARTLY, recompute_granularity="full")
    for name in ("one rank, micro-batch 2", "DP2", "DP2 optim_grads_params", "CP2", "TP2 PP2"):
        add("supervised", name, supervised)
    add("supervised, adapters", "TP2 PP2 SP", supervised, adapters=True)
    for name in ("DP2 optim_grads_params", "TP2 SP"):
        add("adapters in bf16", name, adapted_in_bf16)
    add("waits of the host, dropout", "TP2 SP", host_waits, dropout=DROPOUT)
    for name, share in (("DP2", 1.0), ("DP2 optim", 0.5), ("DP2 optim_grads_params", 0.5), ("DP4 in two copies", 0.5)):
        add("memory", name, memory, share)
    return cases


CASES = _cases()
COMPILED: dict[str, Case] = {
    "compiled: TP2 SP": (2, lambda: compiled(LAYOUTS["TP2 SP"], follow, dropout=DROPOUT)),
    "compiled adapters: TP2 SP": (2, lambda: compiled(LAYOUTS["TP2 SP"], adapted)),
}


def main(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """Run cases and write their errors into `folder`/rank.json."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    cases = CASES | COMPILED
    errors = {name: cases[name][1]() for name in names}
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()

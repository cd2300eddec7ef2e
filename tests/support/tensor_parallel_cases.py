"""What tensor-parallel ranks run: each case compares with one rank, and returns the errors by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lfr.kernels import block_cross_entropy
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.parallel import ParallelConfig, TensorParallel, initialize
from megatron_lfr.parallel.layers import shard_dims
from support.waiting import LIMIT

TOY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    max_position_embeddings=64,
    init_method_std=0.1,
)


def gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def differs_by_rank(*tensors: Tensor) -> float:
    """0 where all ranks hold the same bits."""
    return float(any(not part.equal(tensor) for tensor in tensors for part in gather(tensor)))


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def cross_entropy(
    dtype: torch.dtype = torch.float32, shift: float = 0.0, sequence_parallel: bool = False, **options: Any
) -> dict[str, float]:
    """Compare a vocabulary of 20 rows that is split over the ranks with the full one."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 9, 16, generator=generator).mul(8).round().div(8)
    weight = torch.randn(20, 16, generator=generator).mul(8).round().div(8)
    if shift:
        hidden[..., -1], weight[:, -1] = 1.0, shift
    labels = torch.randint(0, options.get("vocab_size", 20), (4, 9), generator=generator)
    labels[0, :4] = labels[2] = -100
    token_weight = torch.rand(4, 9, generator=generator) / 23
    token_weight[1, 5:] = 0

    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, tokens = (slice(n // ranks * rank, n // ranks * (rank + 1)) for n in (20, 36))

    def run(x: Tensor, w: Tensor, **more: Any) -> tuple[Tensor, ...]:
        x, w = (t.to(dtype).requires_grad_() for t in (x, w))
        loss, stats = block_cross_entropy(x, w, labels, token_weight, chunk_rows=10, **options, **more)
        if options.get("mode") == "score":
            return loss, *stats
        (2 * loss).backward()
        assert x.grad is not None
        assert w.grad is not None
        return loss.detach(), *stats, x.grad, w.grad

    mine = hidden.flatten(0, 1)[tokens] if sequence_parallel else hidden
    loss, nll_sum, count, *gradients = run(
        mine, weight[rows], tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel
    )
    one_loss, one_nll_sum, one_count, *one_gradients = run(hidden, weight)
    errors = {
        "loss": error(loss, one_loss),
        "nll_sum": error(nll_sum, one_nll_sum),
        "count": error(count, one_count),
        "ranks": differs_by_rank(loss, nll_sum, count),
    }
    if gradients:
        d_hidden = one_gradients[0].flatten(0, 1)[tokens] if sequence_parallel else one_gradients[0]
        unshifted = slice(0, -1 if shift else None)
        errors["d_hidden"] = error(gradients[0][..., unshifted], d_hidden[..., unshifted])
        errors["d_weight"] = error(gradients[1], one_gradients[1][rows])
        errors["ranks"] += 0.0 if sequence_parallel else differs_by_rank(gradients[0])
    return errors


def shard_of(full: Tensor, local: Tensor, dim: int | None) -> Tensor:
    """Return this rank's slice of `full`, padded with zeros; all of it where it is not sharded."""
    if dim is None:
        return full
    width, rank = local.shape[dim], dist.get_rank()
    padding = max(dist.get_world_size() * width - full.shape[dim], 0)
    zeros = full.new_zeros([padding if d == dim else n for d, n in enumerate(full.shape)])
    return torch.cat((full, zeros), dim).narrow(dim, rank * width, width)


def llama(
    compute_dtype: torch.dtype = torch.float32,
    recompute: Any = None,
    mode: Any = "auto",
    sequence: bool = False,
    **changes: Any,
) -> dict[str, float]:
    """Weights, loss, statistics and gradients of a toy model on two ranks against one."""
    config = dataclasses.replace(TOY, **changes)
    tp = TensorParallel(dist.group.WORLD, sequence)
    options = {"compute_dtype": compute_dtype, "loss_mode": mode}
    both = Decoder(config, 3, tp=tp, recompute_granularity=recompute, **options)
    one = Decoder(config, 3, **options)
    dims = shard_dims(both)
    tokens = torch.randint(0, 50, (3, 21), generator=torch.Generator().manual_seed(2))
    inputs = (tokens[:, :-1], tokens[:, 1:], torch.full((3, 20), 1 / 60))
    documents = torch.arange(20).div(7, rounding_mode="floor").expand(3, -1)
    errors = {"weights": 0.0, "gradients": 0.0, "ranks": 0.0}
    losses = []
    for model in (both, one):
        loss, *stats = model(*inputs, document_ids=documents)
        loss.backward()
        losses.append((loss.detach(), *stats))
    errors["loss"] = max(error(a, b) for a, b in zip(*losses, strict=True))
    errors["ranks"] += differs_by_rank(*losses[0])
    full = dict(one.named_parameters())
    for name, parameter in both.named_parameters():
        dim = dims[name]
        assert parameter.grad is not None
        assert full[name].grad is not None
        if dim is None and sequence:  # each rank has seen its own tokens
            dist.all_reduce(parameter.grad)
        errors["weights"] = max(errors["weights"], error(parameter, shard_of(full[name], parameter, dim)))
        slice_of_one = shard_of(full[name].grad, parameter, dim)
        errors["gradients"] = max(errors["gradients"], error(parameter.grad, slice_of_one))
        if dim is None:
            errors["ranks"] += differs_by_rank(parameter.grad)
        else:
            errors["weights"] += float(parameter.numel() >= full[name].numel())
    return errors


def mesh() -> dict[str, float]:
    """Make groups of two data-parallel and of two tensor-parallel ranks, which wait as long as is asked for."""
    errors, timeout = {}, timedelta(minutes=7)
    for size in (1, 2):
        state = initialize(ParallelConfig(tensor_model_parallel_size=size), timeout)
        meshed = [state.mesh.get_group(name) for name in state.mesh.mesh_dim_names or ()]
        made = [state.control_group, state.losses_group, *(g for g in meshed if g is not dist.group.WORLD)]
        waits = {group._get_backend(torch.device("cpu")).options._timeout for group in made}
        errors[f"timeouts {size}"] = float(waits != {timeout} or len(made) != 5)
        sizes = (state.data_parallel_size, dist.get_world_size(state.tensor_group), state.data_rank)
        errors[f"sizes {size}"] = float(sizes != (2 // size, size, dist.get_rank() if size == 1 else 0))
    return errors


ALL = {"z_loss": 0.1, "label_smoothing": 0.1, "logit_softcap": 3.0}
CROSS_ENTROPY: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "cross-entropy, chunks": {"mode": "chunk", **ALL},
    "cross-entropy, save": {"mode": "save", **ALL},
    "cross-entropy, score": {"mode": "score", **ALL},
    "cross-entropy, padded": {"vocab_size": 17, **ALL},
    "cross-entropy, a rank of padding": {"vocab_size": 7, **ALL},
    "cross-entropy, a rank of padding, no options": {"vocab_size": 10},
    "cross-entropy, +1000": {"shift": 1000.0, "label_smoothing": 0.1},
    "cross-entropy, -1000": {"shift": -1000.0, "label_smoothing": 0.1},
    "cross-entropy, -1000, a rank of padding": {"shift": -1000.0, "vocab_size": 9},
    "cross-entropy, ragged blocks": {
        "block_ids": torch.tensor([0, 1, 3]).repeat_interleave(torch.tensor([2, 13, 21])).view(4, 9),
        "num_blocks": 4,
    },
    "cross-entropy, sequence parallel": {"sequence_parallel": True, **ALL},
    "cross-entropy, sequence parallel, chunks": {"sequence_parallel": True, "mode": "chunk"},
    "cross-entropy, sequence parallel, score": {"sequence_parallel": True, "mode": "score"},
    "cross-entropy, bf16": {"dtype": torch.bfloat16},
}
"""Name → arguments of cross_entropy: for any number of ranks that divides 4, and both backends."""
CASES: dict[str, Callable[[], dict[str, float]]] = {
    f"{name}{suffix}": partial(cross_entropy, **arguments, **backend)
    for name, arguments in CROSS_ENTROPY.items()
    for suffix, backend in (("", {}), (", Triton", {"backend": "triton"}))
}
CASES_OF_TWO: dict[str, Callable[[], dict[str, float]]] = {
    "mesh": mesh,
    "llama": llama,
    "llama, untied": lambda: llama(untie_embeddings_and_output_weights=True),
    "llama, one key a query": lambda: llama(num_query_groups=None),
    "llama, chunks": lambda: llama(mode="chunk"),
    "llama, recomputed": lambda: llama(recompute="full"),
    "llama, attention recomputed": lambda: llama(recompute="selective"),
    "llama, bf16": lambda: llama(compute_dtype=torch.bfloat16),
    "llama, sequence parallel": lambda: llama(sequence=True),
    "llama, sequence parallel, chunks": lambda: llama(sequence=True, mode="chunk"),
    "llama, sequence parallel, recomputed": lambda: llama(sequence=True, recompute="full", num_query_groups=None),
}


def cases(ranks: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Return what `ranks` ranks run."""
    return CASES | CASES_OF_TWO if ranks == 2 else CASES


def main(rank: int, ranks: int, folder: str) -> None:
    """Run all cases and write their errors into `folder`/rank.json."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    timeout = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    errors = {name: case() for name, case in cases(ranks).items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()

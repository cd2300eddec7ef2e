"""Learn-Focus-Review in the place of Megatron-core's GPTDataset and MegatronPretrainingSampler.

    python examples/megatron_gpt_dataset.py --save runs/gpt                # a toy corpus, 15 seconds on a CPU
    python examples/megatron_gpt_dataset.py --save runs/gpt --resume       # after a run that --exit-interval ended
    torchrun --nproc-per-node 2 examples/megatron_gpt_dataset.py --save runs/gpt

The loop is pretrain_gpt.py's: forward_step(data_iterator, model) returns an output and a loss_func. It needs neither
megatron-core nor a GPU. Three things differ from Megatron's:

LFRDataset   has GPTDataset's samples, but its index is a block id: no document, sample or shuffle index is built. Id
             -1, a row of padding, has a loss mask of zeros.
LFRSampler   deals a step's ids to micro-batches and data-parallel ranks as MegatronPretrainingSampler does. It ends
             with the phase, so that a DataLoader's workers read ahead only within it; `cyclic_iter` begins the next.
loss_func    also keeps each block's summed loss. After a step, one all-reduce of [2, global batch] tells every rank
             the losses of all blocks: each keeps a curriculum of its own, and makes the same orders. Where several
             ranks hold one model (tensor, pipeline), add each loss once: from the last stage of tensor rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from toy_corpus import EOD, VOCAB_SIZE, write_toy_corpus

from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.lfr import BaseCurriculum, Curriculum, Journal, preset

SEQ_LENGTH, GLOBAL_BATCH = 64, 16


class LFRDataset(Dataset[dict[str, Tensor]]):
    """Block id -> GPTDataset's sample of S tokens, with --eod-mask-loss."""

    def __init__(self, source: BlockSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.num_blocks

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        text = torch.from_numpy(self.source.read([idx])[0])
        tokens, labels = text[:-1], text[1:]
        length = len(tokens)
        return {
            "tokens": tokens,
            "labels": labels,
            "attention_mask": torch.ones(1, length, length, dtype=torch.bool).triu(1),  # True: may not attend
            "loss_mask": torch.zeros(length) if idx < 0 else (tokens != EOD).float(),
            "position_ids": torch.arange(length),
        }


class LFRSampler:
    """Micro-batches of one data-parallel rank, to the end of the present phase. `drop_last` is taken for Megatron's
    sake: no micro-batch is ever short, since a phase's last step is filled up with -1."""

    def __init__(
        self,
        curriculum: BaseCurriculum,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
    ) -> None:
        batch = curriculum.plan.global_batch_size
        if consumed_samples != curriculum.next_step * batch:
            raise ValueError(f"consumed_samples {consumed_samples}: the curriculum is at step {curriculum.next_step}")
        if batch % (micro_batch_size * data_parallel_size):
            raise ValueError(f"global batch {batch}: no multiple of micro-batch x data-parallel size")
        self.curriculum, self.rank = curriculum, data_parallel_rank
        self.shape = (-1, data_parallel_size, micro_batch_size)

    def __len__(self) -> int:
        """Micro-batches of this rank in the rest of the run."""
        micro_batches = self.curriculum.plan.global_batch_size // (self.shape[1] * self.shape[2])
        return (self.curriculum.plan.total_steps - self.curriculum.next_step) * micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        self.curriculum.enter_phase()
        for _, block_ids in self.curriculum.remaining_steps():
            yield from block_ids.reshape(self.shape)[:, self.rank].tolist()


def cyclic_iter(loader: Iterable[Any]) -> Iterator[Any]:
    """Megatron's. Each round is a phase."""
    while True:
        yield from loader


class GPT(nn.Module):
    """Like Megatron's GPTModel: with labels, returns the loss of each token [B, S]."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB_SIZE, hidden)
        self.positions = nn.Embedding(SEQ_LENGTH, hidden)
        self.layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(hidden, VOCAB_SIZE)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.layer(self.words(tokens) + self.positions(position_ids), src_mask=attention_mask[0, 0])
        return F.cross_entropy(self.head(hidden).transpose(1, 2), labels, reduction="none")


class BlockLosses:
    """What loss_func saw of each block of a step on this rank."""

    def __init__(self) -> None:
        self.micro_batches: list[Tensor] = []

    def add(self, nll_sum: Tensor, count: Tensor) -> None:
        self.micro_batches.append(torch.stack([nll_sum, count]).detach())

    def drain(self) -> Tensor:
        """[2, global batch] for all ranks, in the order of the step's ids. Collective."""
        mine = torch.stack(self.micro_batches, 1)  # [2, micro-batches, rows]
        self.micro_batches.clear()
        everyone = mine.new_zeros(2, mine.shape[1], dist.get_world_size(), mine.shape[2])
        everyone[:, :, dist.get_rank()] = mine
        dist.all_reduce(everyone)
        return everyone.flatten(1)


def loss_func(losses: BlockLosses, loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor]:
    masked = output_tensor.float() * loss_mask
    losses.add(masked.sum(1), loss_mask.sum(1))
    return masked.sum(), loss_mask.sum()


def forward_step(losses: BlockLosses, data_iterator: Iterator[dict[str, Tensor]], model: nn.Module) -> Any:
    batch = next(data_iterator)
    loss_mask = batch.pop("loss_mask")
    return model(**batch), partial(loss_func, losses, loss_mask)


def train_step(forward_step_func: Any, data_iterator: Any, model: nn.Module, micro_batches: int) -> None:
    """Megatron's forward_backward_func and what follows it, for data parallelism and a plain module."""
    num_tokens = torch.zeros(())
    for _ in range(micro_batches):
        output_tensor, loss_func = forward_step_func(data_iterator, model)
        loss, tokens = loss_func(output_tensor)
        loss.backward()
        num_tokens += tokens
    dist.all_reduce(num_tokens)
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= num_tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save", type=Path, required=True, help="corpus, weights, curriculum's place, a journal a rank"
    )
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--train-epochs", type=float, default=4.0)
    parser.add_argument("--exit-interval", type=int, help="stop after this step")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        write_toy_corpus(args.save)
    dist.barrier()
    corpus = BlockDataset([write_toy_corpus(args.save)], SEQ_LENGTH, split="90,10,0")
    plan = preset("lfr").plan(corpus.train.num_blocks, SEQ_LENGTH, GLOBAL_BATCH, train_epochs=args.train_epochs)
    journal = Journal(args.save / f"journal_{rank}", {"corpus": corpus.fingerprint(), "schedule": "lfr"})
    curriculum = Curriculum(plan, journal, seed=1)
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # without a state, for the checkpoint's sake
    if args.resume:
        load_model(model, args.save / "model.safetensors")
        curriculum.load_state_dict(json.loads((args.save / "curriculum.json").read_text()))

    consumed_samples = curriculum.next_step * GLOBAL_BATCH  # as in Megatron's checkpoint
    sampler = LFRSampler(curriculum, consumed_samples, args.micro_batch_size, rank, ranks)
    data_iterator = cyclic_iter(DataLoader(LFRDataset(corpus.train), batch_sampler=sampler))
    losses = BlockLosses()
    while not curriculum.finished and curriculum.next_step != args.exit_interval:
        train_step(partial(forward_step, losses), data_iterator, model, GLOBAL_BATCH // (args.micro_batch_size * ranks))
        optimizer.step()
        optimizer.zero_grad()
        nll_sum, token_count = losses.drain().numpy()
        curriculum.record(curriculum.next_step, nll_sum, token_count)
        if curriculum.at_boundary and rank == 0:
            kind = plan.at_step(curriculum.next_step - 1).phase.kind
            print(f"{kind:6s} ends at step {curriculum.next_step}: loss {nll_sum.sum() / token_count.sum():.3f}")
    state = curriculum.state_dict()  # on every rank: brings its journal to the disk
    if rank == 0:
        save_model(model, str(args.save / "model.safetensors"))
        (args.save / "curriculum.json").write_text(json.dumps(state))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

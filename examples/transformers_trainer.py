"""Learn-Focus-Review in a transformers Trainer.

    pip install transformers accelerate
    python examples/transformers_trainer.py --output-dir runs/trainer            # a toy corpus, 20 seconds on a CPU
    python examples/transformers_trainer.py --output-dir runs/trainer --resume   # from the newest checkpoint
    torchrun --nproc-per-node 2 examples/transformers_trainer.py --output-dir runs/trainer

Three pieces join the curriculum to an ordinary Trainer:

LFRDataset   serves the blocks of one phase, then ends. Trainer draws batches before it needs them: those of a whole
             accumulation, and accelerate one more. Since the iterator ends with the phase, none of that reaches into
             the next phase, whose order needs losses that are still to come. Trainer then begins another "epoch" and
             asks again; by that time every loss is recorded. So an epoch is a phase, and "epoch" works as the strategy
             of saving and evaluating; the number that Trainer logs as `epoch` means nothing here.
LFRCallback  hands the loss of every block back after each step, and keeps the curriculum's state in the checkpoint's
             trainer_state.json. It needs ignore_data_skip=True: the dataset begins where the curriculum stands.
Broadcast    with several processes: the first keeps the curriculum, the others are sent its orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info
from toy_corpus import VOCAB_SIZE, write_toy_corpus
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.lfr import BaseCurriculum, Curriculum, CurriculumFollower, Journal, Plan, preset

SEQ_LENGTH = 64
IGNORED = -100  # transformers' label of a token that has no loss


def example(row: np.ndarray, block_id: int = 0) -> dict[str, np.ndarray]:
    """Return a block's seq_length + 1 tokens as transformers wants them: it shifts labels. Padding has no loss."""
    return {"input_ids": row, "labels": row if block_id >= 0 else np.full_like(row, IGNORED)}


class LFRDataset(IterableDataset[dict[str, np.ndarray]]):
    """The rest of the curriculum's present phase, block by block. Every process serves the whole of it; accelerate
    takes each one's share (accelerator_config={"dispatch_batches": False})."""

    def __init__(self, curriculum: BaseCurriculum, source: BlockSource) -> None:
        self.curriculum, self.source = curriculum, source

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if get_worker_info() is not None:
            raise ValueError("dataloader_num_workers must be 0: a worker's copy of the curriculum gets no losses")
        if self.curriculum.finished:
            return
        start = self.curriculum.enter_phase()
        left_out = start.selection.dropped_share if start.selection else 0.0
        PartialState().print(f"{start.planned.phase.kind} at step {self.curriculum.next_step}, {left_out:.0%} left out")
        for _, block_ids in self.curriculum.remaining_steps():
            yield from map(example, self.source.read(block_ids), block_ids)


class LFRCallback(TrainerCallback, ExportableState):
    def __init__(self, curriculum: BaseCurriculum) -> None:
        self.curriculum = curriculum
        self.micro_batches: list[torch.Tensor] = []

    def compute_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Trainer's compute_loss_func: the mean over the step's tokens; keeps the summed loss of each block."""
        labels = labels[:, 1:]
        logits = outputs.logits[:, :-1].float()
        token_nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        count = (labels != IGNORED).sum(1)
        if torch.is_grad_enabled():  # not in an evaluation
            self.micro_batches.append(torch.stack([token_nll.detach().sum(1), count.float()]))
        return token_nll.sum() / (count.sum() if num_items_in_batch is None else num_items_in_batch)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        blocks = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if blocks != self.curriculum.plan.global_batch_size:
            raise ValueError(f"Trainer takes {blocks} blocks a step, the plan {self.curriculum.plan.global_batch_size}")
        if not args.ignore_data_skip:
            raise ValueError("ignore_data_skip must be True: the dataset begins where the curriculum stands")
        if state.global_step:
            self.curriculum.load_state_dict(state.stateful_callbacks[type(self).__name__]["attributes"]["curriculum"])

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        mine = torch.stack(self.micro_batches)  # [micro-batches, 2, rows]
        self.micro_batches.clear()
        # A step's blocks go to the first micro-batch of every process, then to their second ones, and so on.
        everyone = gather(mine[None]).permute(2, 1, 0, 3).reshape(2, -1).cpu().numpy()
        self.curriculum.record(self.curriculum.next_step, *everyone)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this; Trainer calls it as it writes one."""
        return {"args": {}, "attributes": {"curriculum": self.curriculum.state_dict()}}


class Broadcast:
    """Each order goes from the first process to the others: megatron_lfr.lfr.Sharing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def share_order(self, phase: int, order: np.ndarray | None) -> np.ndarray:
        ids = torch.empty(self.plan.phases[phase].samples, dtype=torch.int64, device=PartialState().device)
        if order is not None:
            ids.copy_(torch.from_numpy(order.astype(np.int64)))
        return broadcast(ids).cpu().numpy().astype(np.uint64)

    def broadcast(self, value: int) -> int:
        return int(broadcast(torch.tensor([value], dtype=torch.int64, device=PartialState().device)).item())


def make_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=SEQ_LENGTH + 1, **sizes))


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="corpus, checkpoints, journal of losses")
    parser.add_argument("--epochs", type=float, default=3.0, help="length of the run, in epochs of the corpus")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    flags = parser.parse_args(argv)

    arguments = TrainingArguments(
        output_dir=str(flags.output_dir),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=20,
        eval_strategy="epoch",
        ignore_data_skip=True,
        accelerator_config={"dispatch_batches": False},
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    process = PartialState()
    with process.main_process_first():
        prefix = write_toy_corpus(flags.output_dir)
    corpus = BlockDataset([prefix], SEQ_LENGTH, split="90,10,0")
    plan = preset("lfr").plan(
        corpus.train.num_blocks, SEQ_LENGTH, 4 * 2 * process.num_processes, train_epochs=flags.epochs
    )
    arguments.max_steps = plan.total_steps
    if process.is_main_process:
        journal = Journal(flags.output_dir / "journal", {"corpus": corpus.fingerprint(), "schedule": "lfr"})
        sharing = Broadcast(plan) if process.num_processes > 1 else None
        curriculum: BaseCurriculum = Curriculum(plan, journal, seed=1, sharing=sharing)
    else:
        curriculum = CurriculumFollower(plan, Broadcast(plan))

    torch.manual_seed(0)
    callback = LFRCallback(curriculum)
    trainer = Trainer(
        make_model(),
        arguments,
        train_dataset=LFRDataset(curriculum, corpus.train),
        eval_dataset=[example(row) for row in corpus.valid.read(np.arange(corpus.valid.num_blocks))],
        compute_loss_func=callback.compute_loss,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=flags.resume)
    return trainer


if __name__ == "__main__":
    main()

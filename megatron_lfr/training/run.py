"""`megatron-lfr train`: from a configuration to a running trainer."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
import yaml

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig, parse_run_config, resolve_schedule
from megatron_lfr.data.blocks import BlockDataset, BlockSource
from megatron_lfr.data.loader import Loader
from megatron_lfr.data.tokenizer import load_tokenizer
from megatron_lfr.engine import NativeEngine
from megatron_lfr.engine.optimizer import LearningRate
from megatron_lfr.fileio import write_atomic
from megatron_lfr.lfr import Curriculum, Journal, Plan
from megatron_lfr.lfr.curriculum import BlockIds, Rescore
from megatron_lfr.model import Llama
from megatron_lfr.parallel import ParallelState, initialize
from megatron_lfr.training.callbacks import Callback
from megatron_lfr.training.logging import TensorBoard, WeightsAndBiases, console
from megatron_lfr.training.metrics import MetricsFile
from megatron_lfr.training.summary import Summary
from megatron_lfr.training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr train`. Returns the exit code: 0 for a run that ended or was asked to stop."""
    config, notes = parse_run_config(argv)
    for note in notes:
        print(note)
    if config.logging.print_config:
        print(dump_config(config), end="")
        return 0
    train(config)
    return 0


def train(config: RunConfig) -> bool:
    """Train a configuration to its end, or continue it. False when a signal or an exit limit stopped it first.

    Everything that can be wrong with the configuration, the corpus or the run folder raises ValueError or OSError
    before the first step.
    """
    config.validate(world_size=int(os.environ.get("WORLD_SIZE", "1")))
    eod, vocab_size = resolve_vocabulary(config)
    dataset = BlockDataset(config.data.data_path, config.data.seq_length, config.data.split)
    plan = make_plan(config, dataset.train.num_blocks)
    learning_rate = LearningRate(config.optimizer, plan.total_steps, plan.global_batch_size)
    assert config.checkpoint.save is not None
    folder = Path(config.checkpoint.save)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        journal = Journal(folder / "journal", journal_identity(config, plan, dataset))
        timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
        parallel = initialize(config.parallel.distributed_backend, timeout)
        engine = make_engine(config, vocab_size, parallel)
        _check_disk(folder, engine, plan, config)
        write_atomic(folder / "config.yaml", dump_config(config))
        trainer = _assemble(config, folder, dataset, engine, plan, journal, learning_rate, eod)
        step = trainer.resume()
        if step:
            print(f"continuing {folder} at step {step} of {plan.total_steps}", flush=True)
        elif config.checkpoint.finetune:
            assert config.checkpoint.load is not None
            load_weights(Path(config.checkpoint.load), engine)
        return trainer.run()


def resolve_vocabulary(config: RunConfig) -> tuple[int | None, int]:
    """(end-of-document token, vocabulary size) from the tokenizer and --vocab-size."""
    data, asked = config.data, config.model.vocab_size
    if data.tokenizer_model is None:
        for flag, used in (
            ("--eod-mask-loss", data.eod_mask_loss),
            ("--reset-position-ids", data.reset_position_ids),
            ("--reset-attention-mask", data.reset_attention_mask),
        ):
            if used:
                raise ValueError(f"{flag}: needs --tokenizer-model, which knows the end-of-document token")
        if asked is None:
            raise ValueError("give --tokenizer-model or --vocab-size")
        return None, asked
    tokenizer = load_tokenizer(data.tokenizer_model, data.eod_token)
    if asked is not None and tokenizer.vocab_size > asked:
        raise ValueError(
            f"--tokenizer-model {data.tokenizer_model}: its {tokenizer.vocab_size} tokens do not fit into "
            f"--vocab-size {asked}"
        )
    return tokenizer.eod, asked or tokenizer.vocab_size


def make_plan(config: RunConfig, n_blocks: int) -> Plan:
    """The schedule laid out over the corpus."""
    lfr = config.lfr
    data_parallel_size = config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    return resolve_schedule(lfr.lfr_schedule).plan(
        n_blocks,
        config.data.seq_length,
        config.training.blocks_per_step(data_parallel_size),
        train_iters=lfr.train_iters,
        train_samples=lfr.train_samples,
        train_epochs=lfr.train_epochs,
    )


def journal_identity(config: RunConfig, plan: Plan, dataset: BlockDataset) -> dict[str, object]:
    """What the journal's meaning depends on."""
    return {
        "corpus": dataset.fingerprint(),
        "blocks": plan.n_blocks,
        "seq_length": plan.seq_length,
        "global_batch_size": plan.global_batch_size,
        "seed": config.training.seed,
        "schedule": resolve_schedule(config.lfr.lfr_schedule).to_dicts(),
        "draws": [planned.draws for planned in plan.phases],
    }


def make_engine(config: RunConfig, vocab_size: int, parallel: ParallelState) -> NativeEngine:
    """A model with its initial weights, and its optimizer."""
    model = Llama(
        dataclasses.replace(config.model, vocab_size=vocab_size),
        seed=config.training.seed,
        tp_group=parallel.tensor_group,
        compute_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        recompute_granularity=config.training.recompute_granularity,
    )
    return NativeEngine(model, config.optimizer, config.training.micro_batch_size, parallel.device)


def load_weights(run_folder: Path, engine: NativeEngine) -> None:
    """Start from the weights of another run's newest checkpoint (--finetune)."""
    found = CheckpointStore(run_folder / "checkpoints", keep=None).newest_whole()
    if found is None:
        raise ValueError(f"--load {run_folder}: no checkpoint stands there")
    found.load_into(engine.weights(), allow_extra=True)


def dump_config(config: RunConfig) -> str:
    """The effective configuration as YAML that --config reads."""
    text: str = yaml.safe_dump(config.to_flat(), sort_keys=False, allow_unicode=True)
    return text


def _assemble(
    config: RunConfig,
    folder: Path,
    dataset: BlockDataset,
    engine: NativeEngine,
    plan: Plan,
    journal: Journal,
    learning_rate: LearningRate,
    eod: int | None,
) -> Trainer:
    def loader(source: BlockSource) -> Loader:
        data = config.data
        return Loader(
            source,
            eod=eod,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            prefetch=data.prefetch,
        )

    rescore = make_rescore(engine, loader(dataset.train), config.training.micro_batch_size)
    return Trainer(
        engine=engine,
        curriculum=Curriculum(plan, journal, config.training.seed, rescore),
        train_source=dataset.train,
        train_loader=loader(dataset.train),
        valid_source=dataset.valid,
        valid_loader=loader(dataset.valid),
        learning_rate=learning_rate,
        store=CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep_last),
        config=config.training,
        checkpoint=config.checkpoint,
        callbacks=_callbacks(config, folder),
    )


def make_rescore(engine: NativeEngine, loader: Loader, rows: int) -> Rescore:
    """The forward-only pass behind score: rescored, `rows` blocks at a time."""

    def rescore(block_ids: BlockIds) -> npt.NDArray[np.float32]:
        padded = np.full(-(-len(block_ids) // rows) * rows, -1, np.int64)
        padded[: len(block_ids)] = block_ids
        parts = []
        for batch in loader.iterate(enumerate(padded.reshape(-1, rows))):
            losses = engine.eval_step(batch)
            parts.append(losses.nll_sum / np.maximum(losses.token_count, 1))
        return np.concatenate(parts)[: len(block_ids)].astype(np.float32)

    return rescore


def _callbacks(config: RunConfig, folder: Path) -> list[Callback]:
    logging = config.logging
    tensorboard = Path(logging.tensorboard_dir) if logging.tensorboard_dir else folder / "tensorboard"
    callbacks: list[Callback] = [
        MetricsFile(folder / "metrics.jsonl", logging.log_interval),
        console(logging.log_interval),
        TensorBoard(tensorboard, logging.log_interval),
    ]
    if logging.wandb_project:
        flat = config.to_flat()
        callbacks.append(
            WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, folder, flat, logging.log_interval)
        )
    return [*callbacks, Summary(folder)]


def _lock(folder: Path) -> IO[bytes]:
    """Keep a second process out of the run folder; the lock goes with the process, however it ends."""
    file = (folder / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"--save {folder}: another process is training in this folder") from None
    return file


def _check_disk(folder: Path, engine: NativeEngine, plan: Plan, config: RunConfig) -> None:
    """Refuse to start where the checkpoints and the journal will not fit."""
    checkpoint = sum(tensor.nbytes for tensor in engine.tensors().values())
    have = sum(1 for _ in (folder / "checkpoints").glob("iter_*"))
    wanted = (config.checkpoint.keep_last or 1) + 1  # one more while the newest is written beside the old ones
    needed = checkpoint * max(1, wanted - have) + 4 * (plan.total_draws + plan.n_blocks)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"--save {folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for checkpoints of "
            f"{checkpoint / 1e9:.2f} GB (--keep-last {config.checkpoint.keep_last}) and the journal"
        )

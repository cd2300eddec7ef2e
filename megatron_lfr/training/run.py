"""`megatron-lfr train`: from a configuration to a running trainer."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig, parse_run_config, resolve_schedule
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from megatron_lfr.engine import NativeEngine, build_stages
from megatron_lfr.engine.determinism import deterministic
from megatron_lfr.engine.optimizer import LearningRate
from megatron_lfr.identity import describe_changes, make_blend, run_identity
from megatron_lfr.lfr import Blend, Course, Curriculum, Follower, Journal, Plan
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.model import Llama
from megatron_lfr.model.attention import AttentionBackend, describe
from megatron_lfr.model.fused import describe_layers
from megatron_lfr.parallel import ParallelState, initialize, ranks, session
from megatron_lfr.parallel.watch import watching
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.callbacks import Callback
from megatron_lfr.training.evaluation import block_losses
from megatron_lfr.training.launch import exit_code, launch, take_nproc_per_node
from megatron_lfr.training.logging import TensorBoard, WeightsAndBiases, console
from megatron_lfr.training.metrics import MetricsFile
from megatron_lfr.training.nodes import Nodes, OrderFiles, find_nodes, send_journal
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.start import Start, checkpoint_bytes, find_start
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.summary import Summary
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr train`. Returns the exit code, which tells a run that ended from one that was stopped."""
    ranks_here, argv = take_nproc_per_node(argv)
    config, notes = parse_run_config(argv)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note)
    if config.logging.print_config:
        print(config.to_yaml(), end="")
        return 0
    if ranks_here is not None:
        config.validate(ranks_here)
        return launch(ranks_here, ["-m", "megatron_lfr", "train", *argv])
    return exit_code(train(config))


def train(config: RunConfig) -> bool:
    """Train a configuration to its end, or continue it. False when a signal or an exit limit stopped it first.

    Everything that can be wrong with the configuration, the corpus or the run folder raises ValueError or OSError
    before the first step.
    """
    config.validate(world_size=int(os.environ.get("WORLD_SIZE", "1")))
    eod, vocab_size = resolve_vocabulary(config)
    dataset = BlockDataset(config.data.corpora()[0], config.data.seq_length, config.data.split)
    data = settle_documents(config.data, vocab_size, dataset.datasets)
    if data.bos and not config.data.bos and os.environ.get("RANK", "0") == "0":
        print("the corpus' documents start with the tokenizer's start-of-document token: --bos is in force", flush=True)
    config = dataclasses.replace(config, data=data)
    plan = make_plan(config, dataset.train.num_blocks, blend=make_blend(config, dataset))
    learning_rate = LearningRate(config.optimizer, plan.total_steps, plan.global_batch_size)
    facts = run_identity(config, vocab_size, eod, dataset, plan)
    assert config.checkpoint.save is not None
    folder = RunFolder(config.checkpoint.save, "--save")
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    with ExitStack() as stack:
        stack.enter_context(session())
        parallel = initialize(config.parallel, timeout)
        stack.enter_context(watching(timeout.total_seconds() / 2))  # before collectives give up without naming anyone
        stack.enter_context(deterministic(config.training.deterministic))
        nodes = find_nodes(parallel)
        with _held(folder):
            start = find_start(config, folder, facts, plan, vocab_size, parallel.control_group)
            engine = make_engine(config, vocab_size, plan, parallel, initialize_weights=start.draws_weights)
            start.load_into(engine)
            # Whatever can be refused has been looked at; from here on, the folder is written to.
            journal = _open_journal(config, folder, nodes, facts, start)
            trainer = _assemble(config, folder, dataset, engine, plan, nodes, journal, learning_rate, eod, facts)
            send_journal(journal, nodes)
            trainer.resume(start.state)
            if ranks.rank() == 0:
                _note_settings(config, folder, plan, start)
                training = config.training
                print(describe_layers(parallel.device.type, training.compile, training.layer_kernels), flush=True)
                print(describe_attention(config, engine.stages[0].attention_backend), flush=True)
                if note := trainer.patience.expect(checkpoint_bytes(config, vocab_size), ranks.world_size()):
                    print(note, flush=True)
                if trainer.evaluated_blocks < dataset.valid.num_blocks:
                    print(
                        f"evaluations take {trainer.evaluated_blocks:,} of the {dataset.valid.num_blocks:,} validation "
                        f"blocks (--eval-iters {config.training.eval_iters}; None takes all)",
                        flush=True,
                    )
            finished = trainer.run()
            dist.barrier(group=parallel.control_group)  # no rank leaves while another still needs it
    return finished


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


def make_plan(config: RunConfig, n_blocks: int, world_size: int | None = None, blend: Blend | None = None) -> Plan:
    """The schedule laid out over the corpus, for `world_size` ranks (by default as many as have been started)."""
    lfr = config.lfr
    data_parallel_size = config.parallel.data_parallel_size(world_size or int(os.environ.get("WORLD_SIZE", "1")))
    try:
        return resolve_schedule(lfr.lfr_schedule).plan(
            n_blocks,
            config.data.seq_length,
            config.training.blocks_per_step(data_parallel_size),
            train_iters=lfr.train_iters,
            train_samples=lfr.train_samples,
            train_epochs=lfr.train_epochs,
            blend=blend,
        )
    except ValueError as error:
        if "--" in str(error):  # names the flag already
            raise
        raise ValueError(f"--lfr-schedule {lfr.lfr_schedule}: {error}") from None


def make_engine(
    config: RunConfig, vocab_size: int, plan: Plan, parallel: ParallelState, initialize_weights: bool
) -> NativeEngine:
    """This rank's part of a model, see make_stages, and its optimizer."""
    return NativeEngine(
        make_stages(config, vocab_size, parallel, initialize_weights),
        config.optimizer,
        parallel,
        seq_length=plan.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=plan.global_batch_size,
    )


def make_stages(config: RunConfig, vocab_size: int, parallel: ParallelState, initialize_weights: bool) -> list[Llama]:
    """This rank's part of a model, with its initial weights or with undefined ones, for a checkpoint to be loaded."""
    training = config.training
    return build_stages(
        dataclasses.replace(config.model, vocab_size=vocab_size),
        training.seed if initialize_weights else None,
        parallel,
        compute_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        recompute_granularity=training.recompute_granularity,
        compile_layers=training.compile,
        kernels=training.layer_kernels,
        loss=config.loss,
        attention_backend=config.attention_backend(parallel.device.type == "cuda"),
    )


def describe_attention(config: RunConfig, backend: AttentionBackend) -> str:
    """One line on the attention of a run."""
    return describe(
        backend,
        rows=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        context_ranks=config.parallel.context_parallel_size,
        has_documents=config.data.reset_attention_mask,
        is_compiled=config.training.compile,
        itemsize=2 if config.training.bf16 else 4,
    )


def make_loader(config: RunConfig, source: BlockSource, eod: int | None, parallel: ParallelState) -> Loader:
    """Reads this rank's share of each batch, with the run's rules for documents."""
    data = config.data
    return Loader(
        source,
        eod=eod,
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        prefetch=data.prefetch,
        rank=parallel.data_rank,
        ranks=parallel.data_parallel_size,
        pin_memory=parallel.device.type == "cuda",
    )


def _assemble(
    config: RunConfig,
    folder: RunFolder,
    dataset: BlockDataset,
    engine: NativeEngine,
    plan: Plan,
    nodes: Nodes,
    journal: Journal | None,
    learning_rate: LearningRate,
    eod: int | None,
    facts: dict[str, Any],
) -> Trainer:
    stopping, times = Stopping(config.training, engine.parallel.control_group), Stopwatch()

    def loader(source: BlockSource) -> Loader:
        return make_loader(config, source, eod, engine.parallel)

    return Trainer(
        engine=engine,
        curriculum=_make_course(
            config,
            folder.path,
            plan,
            nodes,
            journal,
            make_rescore(engine, loader(dataset.train), stopping, times),
            make_blend(config, dataset),
        ),
        train_source=dataset.train,
        train_loader=loader(dataset.train),
        valid_source=dataset.valid,
        valid_loader=loader(dataset.valid),
        learning_rate=learning_rate,
        store=CheckpointStore(
            folder.checkpoint_folder,
            keep=config.checkpoint.keep_last,
            group=engine.parallel.control_group,
            asynchronous=config.checkpoint.async_save,
            timeout=engine.parallel.timeout,
        ),
        config=config.training,
        checkpoint=config.checkpoint,
        identity=facts,
        callbacks=_callbacks(config, folder, journal) if journal is not None and nodes.index == 0 else [],
        stopping=stopping,
        times=times,
        patience=Patience(config.checkpoint.async_save),
    )


def _make_course(
    config: RunConfig,
    folder: Path,
    plan: Plan,
    nodes: Nodes,
    journal: Journal | None,
    rescore: Rescore,
    blend: Blend,
) -> Course:
    """The curriculum on its machine's leader, a follower on the other ranks."""
    if nodes.group.size() == 1:
        assert journal is not None
        return Curriculum(plan, journal, config.training.seed, rescore, blend=blend)
    sharing = OrderFiles(nodes, scratch_folder(config, folder, nodes))
    if journal is None:
        return Follower(plan, sharing, rescore)
    return Curriculum(plan, journal, config.training.seed, rescore, sharing, blend)


def scratch_folder(config: RunConfig, folder: Path, nodes: Nodes) -> Path:
    """Where a machine keeps what its ranks share; runs that are given one --lfr-scratch-dir do not meet there."""
    if config.lfr.lfr_scratch_dir is None:
        return folder / "scratch" / f"node_{nodes.index}"
    run = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return Path(config.lfr.lfr_scratch_dir) / f"run_{run}" / f"node_{nodes.index}"


def make_rescore(engine: NativeEngine, loader: Loader, stopping: Stopping, times: Stopwatch) -> Rescore:
    """The forward-only pass behind score: rescored. It raises StoppedError where the run is to stop."""

    def rescore(block_ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        for (_, losses), _ in times.each("rescoring", block_losses(engine, loader, block_ids, stopping.look)):
            yield (losses.nll_sum / np.maximum(losses.token_count, 1)).astype(np.float32)

    return rescore


def _callbacks(config: RunConfig, folder: RunFolder, journal: Journal) -> list[Callback]:
    logging = config.logging
    callbacks: list[Callback] = [
        MetricsFile(folder.metrics_file, logging.log_interval),
        console(logging.log_interval),
        TensorBoard(logging.tensorboard(folder.tensorboard_folder), logging.log_interval),
    ]
    if logging.wandb_project:
        flat = config.to_flat()
        callbacks.append(
            WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, folder.path, flat, logging.log_interval)
        )
    return [*callbacks, Summary(folder, journal)]


def _open_journal(
    config: RunConfig, folder: RunFolder, nodes: Nodes, facts: dict[str, Any], start: Start
) -> Journal | None:
    """The journal that this rank keeps: the run's on rank 0, a copy on the leaders of other machines."""
    with ranks.failing_together():
        if not nodes.is_leader:
            return None
        is_copy = nodes.index > 0
        path = scratch_folder(config, folder.path, nodes) / "journal" if is_copy else folder.journal.folder
        if is_copy or start.checkpoint is None:  # a copy is sent anew; of a run that starts anew, nothing holds
            JournalFiles(path).clear()
        return Journal(path, facts)


def _note_settings(config: RunConfig, folder: RunFolder, plan: Plan, start: Start) -> None:
    """Put the settings in force, and say what changes for a run that was there before."""
    settings = config.to_flat()
    changed = describe_changes(folder.changes(settings, start.step)) if start.checkpoint else ""
    if start.step == plan.total_steps:
        told = f"; nothing is left that could change by {changed}" if changed else ""
        print(f"{folder.path} is finished at step {start.step}{told}", flush=True)
        return
    if start.checkpoint:
        own = f" (--load {config.checkpoint.load} was for its start)" if config.checkpoint.finetune else ""
        print(f"continuing {folder.path} at step {start.step} of {plan.total_steps}{own}", flush=True)
    if start.discarded:
        print(
            f"{folder.path}: the run there was stopped before its first checkpoint and starts anew; the "
            f"{start.discarded} losses in its journal, and its metrics.jsonl, are discarded",
            flush=True,
        )
    if changed:
        print(f"settings that change from step {start.step} on: {changed}", flush=True)
    folder.write_settings(settings, start.step)


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """The run folder, on rank 0 held against other processes; the lock goes with the process, however it ends."""
    with ExitStack() as stack:
        with ranks.failing_together():
            if ranks.rank() == 0:
                stack.enter_context(folder.hold())
        yield

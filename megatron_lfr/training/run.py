"""`megatron-lfr train` trains a run, from its configuration to its last step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch.distributed as dist

from megatron_lfr.build import (
    make_arrays,
    make_blend,
    make_corpus,
    make_curriculum,
    make_engine,
    make_loader,
    make_model_config,
    make_plan,
    make_tokenizer,
)
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch, parse_run_config
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.engine.determinism import deterministic
from megatron_lfr.engine.optimizer import LearningRate
from megatron_lfr.identity import run_identity
from megatron_lfr.parallel import initialize, ranks, session
from megatron_lfr.parallel.watch import watching
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.callbacks import Callback, callback_class
from megatron_lfr.training.evaluation import make_rescore
from megatron_lfr.training.launch import exit_code, launch, take_nproc_per_node
from megatron_lfr.training.listeners import make_callbacks
from megatron_lfr.training.nodes import broadcast_journal, find_nodes, share_orders
from megatron_lfr.training.opening import announce
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.start import find_start, held, open_journal
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr train`. Returns the exit code, which tells a run that ended from one that was stopped."""
    local_ranks, argv = take_nproc_per_node(argv)
    config, notes = parse_run_config(argv)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note)
    if config.logging.print_config:
        print(config.to_yaml(), end="")
        return 0
    if local_ranks is not None:
        fill_batch(config, local_ranks).validate(local_ranks)
        return launch(local_ranks, ["-m", "megatron_lfr", "train", *argv])
    return exit_code(train(config))


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> bool:
    """Train a configuration to its end, or continue its run. Returns False when a signal or an exit limit stopped it.

    callbacks: are called on rank 0, after those of every run and before those of --callback.
    Whatever is wrong with the configuration, the corpus or the run folder raises ValueError or OSError before the first
    step.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = fill_batch(config, world_size)
    config.validate(world_size)
    callback_classes = [callback_class(name) for name in config.logging.callback]
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    corpus = make_corpus(config.data)
    assert model.vocab_size is not None
    data = settle_documents(config.data, tokenizer, model.vocab_size, corpus.datasets)
    if data.bos and not config.data.bos and os.environ.get("RANK", "0") == "0":
        print("the documents of the corpus begin with the tokenizer's start-of-document token: --bos is on", flush=True)
    config = dataclasses.replace(config, data=data)
    blend = make_blend(config, corpus)
    assert config.checkpoint.save is not None
    folder = RunFolder(config.checkpoint.save, "--save")
    plan = make_plan(config, corpus.train.num_blocks, blend=blend, remembered=folder.remembered_phases())
    config.checkpoint.check_retained(plan.total_steps)
    arrays = make_arrays(config, corpus, plan)
    facts = run_identity(config, model, tokenizer, corpus, plan, blend, arrays)
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    with ExitStack() as stack:
        stack.enter_context(session())
        parallel = initialize(config.parallel, timeout)
        stack.enter_context(watching(timeout.total_seconds() / 2))  # before collectives give up without naming anyone
        stack.enter_context(deterministic(config.training.deterministic))
        nodes = find_nodes(parallel)
        with ranks.failing_together():  # what users wrote may fail: before anything is written
            listeners = [*callbacks, *(make() for make in callback_classes)] if ranks.rank() == 0 else []
        stack.enter_context(held(folder))

        start = find_start(config, folder, facts, plan, model, parallel.control_group)
        deepspeed = deepspeed_settings(config, world_size) if config.deepspeed.deepspeed else None
        engine = make_engine(config, model, plan, parallel, start.draws_weights, deepspeed)
        start.load_into(engine)

        # Everything that can be refused has been checked; from here on, the folder is written to.
        scratch = config.lfr.scratch(folder.path, nodes.index)
        if deepspeed is not None and ranks.rank() == 0:
            folder.write_deepspeed(deepspeed)
        journal = open_journal(folder, nodes, facts, start, scratch)
        loaders = [make_loader(config, source, tokenizer, parallel) for source in (corpus.train, corpus.valid)]
        stopping, times = Stopping(config.training, parallel.control_group), Stopwatch()
        rescore = make_rescore(engine, make_loader(config, corpus.train, tokenizer, parallel), stopping, times)
        trainer = Trainer(
            engine=engine,
            curriculum=make_curriculum(config, plan, blend, journal, share_orders(nodes, scratch), rescore, arrays),
            train_source=corpus.train,
            train_loader=loaders[0],
            valid_source=corpus.valid,
            valid_loader=loaders[1],
            learning_rate=LearningRate(config.optimizer, plan.total_steps, plan.global_batch_size),
            store=CheckpointStore(
                folder.checkpoint_folder,
                keep=config.checkpoint.keep_last,
                group=parallel.control_group,
                asynchronous=config.checkpoint.async_save,
                timeout=parallel.timeout,
                retains=config.checkpoint.retains,
            ),
            config=config.training,
            checkpoint=config.checkpoint,
            identity=facts,
            callbacks=make_callbacks(config, folder, journal, listeners)
            if journal is not None and ranks.rank() == 0
            else [],
            stopping=stopping,
            times=times,
            patience=Patience(config.checkpoint.async_save),
        )
        broadcast_journal(journal, nodes)
        trainer.resume(start.state)
        if ranks.rank() == 0:
            announce(config, folder, model, parallel, start, trainer, arrays)
        finished = trainer.run()
        dist.barrier(group=parallel.control_group)  # no rank leaves while another still needs it
    return finished

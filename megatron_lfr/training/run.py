"""`megatron-lfr train` trains a run, from its configuration to its last step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_lfr.build import make_curriculum, make_engine, make_loader
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch, parse_run_config
from megatron_lfr.engine.determinism import deterministic
from megatron_lfr.lfr.functions import check_functions
from megatron_lfr.parallel import initialize, ranks, session
from megatron_lfr.parallel.devices import peak_tflops
from megatron_lfr.parallel.launchers import adopt_launcher
from megatron_lfr.parallel.watch import watching
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.callbacks import Callback, callback_class
from megatron_lfr.training.evaluation import make_rescore
from megatron_lfr.training.inputs import open_inputs
from megatron_lfr.training.launch import exit_code, start_ranks, take_nproc_per_node
from megatron_lfr.training.lengthening import check_batches, describe_lengthening, stored_plan, write_lengthening
from megatron_lfr.training.listeners import make_callbacks
from megatron_lfr.training.nodes import broadcast_journal, find_nodes, share_orders
from megatron_lfr.training.opening import announce, describe_branches
from megatron_lfr.training.patience import Patience
from megatron_lfr.training.start import find_start, held, open_journal
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.trainer import Trainer
from megatron_lfr.training.upkeep import collecting_together, profiling


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr train`. Returns the exit code, which tells a run that ended from one that was stopped."""
    local_ranks, argv = take_nproc_per_node(argv)
    config, notes = parse_run_config(argv)
    if adopt_launcher().rank == 0:
        for note in notes:
            print(note)
    if config.logging.print_config:
        print(config.to_yaml(), end="")
        return 0
    if local_ranks is not None:
        fill_batch(config, local_ranks).validate(local_ranks)
        return start_ranks(local_ranks, ["-m", "megatron_lfr", "train", *argv])
    return exit_code(train(config))


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> bool:
    """Train a configuration to its end, or continue its run. Returns False when a signal or an exit limit stopped it.

    callbacks: are called on rank 0, after those of every run and before those of --callback.
    Whatever is wrong with the configuration, the corpus or the run folder raises ValueError or OSError before the first
    step.
    """
    world_size = adopt_launcher().world_size
    config = fill_batch(config, world_size)
    config.validate(world_size)
    callback_classes = [callback_class(name) for name in config.logging.callback]
    assert config.checkpoint.save is not None
    folder = RunFolder(config.checkpoint.save, "--save")
    stored = stored_plan(folder)
    inputs = open_inputs(config, folder, stored)
    config, model, plan = inputs.config, inputs.model, inputs.plan
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

        start = find_start(config, folder, inputs.facts, plan, model, parallel.control_group)
        check_batches(config, plan, start.step)
        with ranks.failing_together():
            check_functions(plan, start.step)
        lengthening = describe_lengthening(config, stored, plan, start.step)
        deepspeed = deepspeed_settings(config, world_size) if config.deepspeed.deepspeed else None
        engine = make_engine(config, model, plan, parallel, start.draws_weights, deepspeed)
        start.load_into(engine)

        # Everything that can be refused has been checked; from here on, the folder is written to.
        scratch = config.lfr.scratch(folder.path, nodes.index)
        if deepspeed is not None and ranks.rank() == 0:
            assert config.deepspeed.deepspeed_config is not None
            folder.write_deepspeed(deepspeed, Path(config.deepspeed.deepspeed_config))
        if lengthening is not None and ranks.rank() == 0:
            write_lengthening(config, folder, inputs.facts, start, lengthening)
        journal = open_journal(folder, nodes, inputs.facts, start, scratch)
        train_loader, valid_loader, rescoring_loader = (
            make_loader(config, source, inputs.tokenizer, parallel)
            for source in (inputs.corpus.train, inputs.validation, inputs.corpus.train)
        )
        stopping, times = Stopping(config.training, parallel.control_group), Stopwatch()
        rescore = make_rescore(engine, rescoring_loader, stopping, times)
        trainer = Trainer(
            engine=engine,
            curriculum=make_curriculum(config, plan, journal, share_orders(nodes, scratch), rescore, inputs.arrays),
            train_loader=train_loader,
            valid_loader=valid_loader,
            learning_rate=inputs.learning_rate,
            end_step=inputs.end_step,
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
            identity=inputs.facts,
            callbacks=make_callbacks(config, folder, journal, listeners),
            stopping=stopping,
            times=times,
            patience=Patience(config.checkpoint.async_save),
            peak_tflops=config.logging.peak_tflops or peak_tflops(parallel.device, config.training.bf16),
            after_step=[
                stack.enter_context(collecting_together(config.training)),
                stack.enter_context(profiling(config.logging, folder.profile_folder, start.step)),
            ],
        )
        broadcast_journal(journal, nodes)
        trainer.resume(start.state)
        if ranks.rank() == 0:
            announce(config, folder, model, parallel, start, trainer, inputs.arrays)
        finished = trainer.run()
        if finished and inputs.main_path is not None and ranks.rank() == 0:
            print(describe_branches(inputs.main_path, folder.path), flush=True)
        dist.barrier(group=parallel.control_group)  # no rank leaves while another still needs it
    return finished

"""Finds where a run begins: at its newest complete checkpoint, at another run's weights, or at step 0.

Everything that can be refused is checked here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from megatron_lfr.checkpoint import Checkpoint
from megatron_lfr.checkpoint.state import STATE_FILE
from megatron_lfr.config import RunConfig
from megatron_lfr.engine import Engine
from megatron_lfr.fileio import check_space
from megatron_lfr.identity import (
    check_facts,
    check_same_adapters,
    check_same_model,
    check_same_run,
    comparable_settings,
    open_base,
)
from megatron_lfr.lfr import Journal, Plan
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.lora import LoRAConfig, adapter_parameters
from megatron_lfr.parallel import ranks
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.position import read_position
from megatron_lfr.training.nodes import Nodes


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Checkpoint | None
    """The checkpoint that it continues from; None at step 0."""
    weights: Checkpoint | None
    """The checkpoint that holds its first weights, which are random without --finetune (None); for a run of adapters,
    their base, also where it continues."""
    discarded: int
    """Number of losses in the journal of a run that was stopped before its first checkpoint, and starts anew."""
    adapters: Checkpoint | None = None
    """The checkpoint that holds its first adapters, which are new without --lora-load (None)."""

    @property
    def step(self) -> int:
        """The number of steps taken so far."""
        return self.checkpoint.iteration if self.checkpoint else 0

    @property
    def draws_weights(self) -> bool:
        """Whether its first weights are random."""
        return self.checkpoint is None and self.weights is None

    @property
    def state(self) -> dict[str, Any]:
        """The checkpoint's JSON state; {} at step 0."""
        return self.checkpoint.state if self.checkpoint else {}

    def load_into(self, engine: Engine) -> None:
        """Load what the run begins with into the engine. Collective; errors as from `Checkpoint.load_into`."""
        base = engine.base_weights()
        if self.weights and base:
            self.weights.load_into(base, allow_extra=True, rounds=True)
        if self.checkpoint:
            self.checkpoint.load_into(engine.tensors())
        elif self.adapters:
            self.adapters.load_into(engine.weights(), allow_extra=True)
        elif self.weights and not base:
            self.weights.load_into(engine.weights(), allow_extra=True)
        engine.loaded()


def find_start(
    config: RunConfig, folder: RunFolder, facts: Mapping[str, Any], plan: Plan, model: ModelConfig, group: ProcessGroup
) -> Start:
    """Find where the run of `config`, whose identity is `facts`, begins. Collective.

    ValueError or OSError where the folder holds another run, damaged files, or no room.
    """
    checkpoint = folder.find_checkpoint(group)
    _check_step(config, folder, checkpoint)
    discarded = 0
    with ranks.failing_together(group):
        if ranks.rank(group) == 0:
            folder.check_writable(config.logging.tensorboard(folder.tensorboard_folder))
            discarded = 0 if checkpoint else folder.journal.count_entries()
            if checkpoint or discarded:
                _check_run(folder, checkpoint, facts, config.to_flat())
            else:
                folder.check_is_free()
            _check_disk(folder, plan, checkpoint_bytes(model, config.lora), config)
    is_needed = config.checkpoint.finetune and (checkpoint is None or config.lora.lora_rank is not None)
    weights = _find_weights(config, facts, group) if is_needed else None
    adapters = _find_adapters(config, facts, group) if config.lora.lora_load and checkpoint is None else None
    return Start(checkpoint, weights, discarded, adapters)


def _check_step(config: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """ValueError where --ckpt-step asks a run to go back, which would lose what it has trained since."""
    step, newest = config.checkpoint.ckpt_step, checkpoint.iteration if checkpoint else 0
    if step is None or config.checkpoint.finetune or step == newest:
        return
    raise ValueError(
        f"--ckpt-step {step}: the run in {folder.path} has its newest complete checkpoint at step {newest}, from which "
        f"it goes on. From a saved step before that, go on beside it: megatron-lfr branch --from {folder.path} "
        f"--at-step {step} --lr-schedule inherit --save NEW"
    )


def _check_run(
    folder: RunFolder, checkpoint: Checkpoint | None, facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    if checkpoint and "curriculum" not in checkpoint.state:
        has_adapters = "lora" in (checkpoint.state.get("identity") or {})
        flags = f"--lora-load {folder.path}" if has_adapters else f"--load {folder.path} --finetune"
        raise ValueError(
            f"--save {folder.path}: holds only weights, no run. Start a run from them with {flags} and another folder "
            "for --save"
        )
    journal = folder.journal
    remembered = {journal.folder / "meta.json": folder.identity()}
    position = read_position(checkpoint) if checkpoint else None
    if checkpoint:
        remembered[checkpoint.folder / STATE_FILE] = checkpoint.state["identity"]
    was = folder.settings_at(checkpoint.iteration if checkpoint else 0)
    for source, stored in remembered.items():
        check_facts(source, stored)
        check_same_run(folder.path, stored, facts, was, settings)
    if position:
        journal.check_holds(position.phase, position.entries)
        folder.events(position.metrics_bytes)


def _find_weights(config: RunConfig, facts: Mapping[str, Any], group: ProcessGroup) -> Checkpoint:
    """Return the checkpoint of --load, its newest or that of --ckpt-step. ValueError where it is missing, or its
    weights would compute something else here."""
    assert config.checkpoint.load is not None
    folder = RunFolder(config.checkpoint.load, "--load")
    step = config.checkpoint.ckpt_step
    try:
        checkpoint = open_base(config, facts, group) if "lora" in facts else folder.checkpoint(step, group)
    except ValueError as error:
        raise error if step is None else ValueError(f"--ckpt-step {step}: {error}") from None
    if "lora" in (checkpoint.state.get("identity") or {}):
        raise ValueError(
            f"--load {folder.path}: holds adapters alone, no model to start from; --lora-load starts from adapters"
        )
    legal, may_differ = comparable_settings(facts), config.checkpoint.finetune_change
    if unknown := [name for name in may_differ if name not in legal]:
        raise ValueError(f"--finetune-change {unknown[0]}: choose from {', '.join(legal)}")
    with ranks.failing_together(group):
        if ranks.rank(group) == 0:
            was = folder.settings_at(checkpoint.iteration)
            what = f"--load {folder.path} (name settings that are meant to differ with --finetune-change)"
            check_same_model(what, checkpoint, facts, was, config.to_flat(), may_differ)
    return checkpoint


def _find_adapters(config: RunConfig, facts: Mapping[str, Any], group: ProcessGroup) -> Checkpoint:
    """Return the newest checkpoint of --lora-load. ValueError where it is missing, or its adapters are of another kind
    or base."""
    assert config.lora.lora_load is not None
    folder = RunFolder(config.lora.lora_load, "--lora-load")
    checkpoint = folder.checkpoint(None, group)
    with ranks.failing_together(group):
        if ranks.rank(group) == 0:
            was = folder.settings_at(checkpoint.iteration)
            check_same_adapters(f"--lora-load {folder.path}", checkpoint, facts, was, config.to_flat())
    return checkpoint


def _check_disk(folder: RunFolder, plan: Plan, checkpoint: int, config: RunConfig) -> None:
    """OSError where the checkpoints, of so many bytes each, and the journal will not fit on the disk."""
    stored = sum(1 for _ in folder.checkpoint_folder.glob("iter_*"))
    retained = sum(map(config.checkpoint.retains, range(1, plan.total_steps + 1)))
    at_once = (config.checkpoint.keep_last or 1) + 1 + retained  # one while the newest is written beside the old ones
    needed = checkpoint * max(1, at_once - stored) + 4 * (plan.total_samples + plan.n_blocks)
    kept = f"{at_once} checkpoints of {checkpoint / 1e9:.2f} GB (--keep-last {config.checkpoint.keep_last}"
    kept += " and those that are retained" if retained else ""
    check_space("--save", folder.path, needed, f"{kept}) and the journal")


def checkpoint_bytes(model: ModelConfig, lora: LoRAConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, or adapters, and two moments in fp32."""
    return 3 * 4 * (model.num_parameters() if lora.lora_rank is None else adapter_parameters(model, lora))


def open_journal(
    folder: RunFolder, nodes: Nodes, facts: Mapping[str, Any], start: Start, scratch: Path
) -> Journal | None:
    """Open the journal that this rank keeps: the run's on rank 0, a copy in `scratch` on the leaders of other nodes,
    and None on the other ranks. Collective."""
    with ranks.failing_together():
        if not nodes.is_leader:
            return None
        is_copy = nodes.index > 0
        path = scratch / "journal" if is_copy else folder.journal.folder
        if is_copy or start.checkpoint is None:  # a copy is sent again; a run that starts anew discards its losses
            JournalFiles(path).clear()
        return Journal(path, facts)


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Lock the run folder on rank 0 against other processes. The lock ends with the process, however that ends."""
    with ExitStack() as stack:
        with ranks.failing_together():
            if ranks.rank() == 0:
                stack.enter_context(folder.hold())
        yield

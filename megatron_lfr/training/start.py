"""Where a run begins: at its newest whole checkpoint, at another run's weights, or at step 0.

Everything that can be refused is looked at here, and nothing is written.
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
from megatron_lfr.identity import check_facts, check_same_model, check_same_run, comparable_settings
from megatron_lfr.lfr import Journal, Plan
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel import ranks
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.position import read_position
from megatron_lfr.training.nodes import Nodes


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Checkpoint | None
    """What it goes on from; None at step 0."""
    weights: Checkpoint | None
    """What its first weights come from instead of being drawn; None without --finetune."""
    discarded: int
    """Losses in the journal of a run that was stopped before its first checkpoint, and starts anew."""

    @property
    def step(self) -> int:
        return self.checkpoint.iteration if self.checkpoint else 0

    @property
    def draws_weights(self) -> bool:
        """Whether its first weights are drawn."""
        return self.checkpoint is None and self.weights is None

    @property
    def state(self) -> dict[str, Any]:
        """The checkpoint's JSON state; {} at step 0."""
        return self.checkpoint.state if self.checkpoint else {}

    def load_into(self, engine: Engine) -> None:
        """Give the engine what the run begins with. Collective; errors as from `Checkpoint.load_into`."""
        if self.checkpoint:
            self.checkpoint.load_into(engine.tensors())
        elif self.weights:
            self.weights.load_into(engine.weights(), allow_extra=True)
        engine.loaded()


def find_start(
    config: RunConfig, folder: RunFolder, facts: Mapping[str, Any], plan: Plan, model: ModelConfig, group: ProcessGroup
) -> Start:
    """Where the run of `config`, whose identity is `facts`, begins. Collective.

    ValueError or OSError where the folder holds another run, damaged files, or no room.
    """
    checkpoint = folder.find_checkpoint(group)
    discarded = 0
    with ranks.failing_together(group):
        if ranks.rank(group) == 0:
            folder.check_places(config.logging.tensorboard(folder.tensorboard_folder))
            discarded = 0 if checkpoint else folder.journal.count_entries()
            if checkpoint or discarded:
                _check_run(folder, checkpoint, facts, config.to_flat())
            else:
                folder.check_is_free()
            _check_disk(folder, plan, model, config)
    weights = None if checkpoint or not config.checkpoint.finetune else _find_weights(config, facts, group)
    return Start(checkpoint, weights, discarded)


def _check_run(
    folder: RunFolder, checkpoint: Checkpoint | None, facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    if checkpoint and "curriculum" not in checkpoint.state:
        raise ValueError(
            f"--save {folder.path}: holds weights alone, no run. Start one from them with --load {folder.path} "
            "--finetune and another folder for --save"
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
    """The newest checkpoint of --load, whose weights mean the same here."""
    assert config.checkpoint.load is not None
    folder = RunFolder(config.checkpoint.load, "--load")
    found = folder.checkpoint(group=group)
    legal, may_differ = comparable_settings(facts), config.checkpoint.finetune_change
    if unknown := [name for name in may_differ if name not in legal]:
        raise ValueError(f"--finetune-change {unknown[0]}: choose from {', '.join(legal)}")
    with ranks.failing_together(group):
        if ranks.rank(group) == 0:
            was = folder.settings_at(found.iteration)
            what = f"--load {folder.path} (settings that are meant to differ are named with --finetune-change)"
            check_same_model(what, found, facts, was, config.to_flat(), may_differ)
    return found


def _check_disk(folder: RunFolder, plan: Plan, model: ModelConfig, config: RunConfig) -> None:
    """Refuse to start where the checkpoints and the journal will not fit."""
    checkpoint = checkpoint_bytes(model)
    have = sum(1 for _ in folder.checkpoint_folder.glob("iter_*"))
    retained = sum(map(config.checkpoint.retains, range(1, plan.total_steps + 1)))
    wanted = (config.checkpoint.keep_last or 1) + 1 + retained  # one while the newest is written beside the old ones
    needed = checkpoint * max(1, wanted - have) + 4 * (plan.total_samples + plan.n_blocks)
    kept = f"{wanted} checkpoints of {checkpoint / 1e9:.2f} GB (--keep-last {config.checkpoint.keep_last}"
    kept += " and those that are retained" if retained else ""
    check_space("--save", folder.path, needed, f"{kept}) and the journal")


def checkpoint_bytes(model: ModelConfig) -> int:
    """The size of a checkpoint's tensors: weights and two moments in fp32."""
    return 3 * 4 * model.num_parameters()


def open_journal(
    folder: RunFolder, nodes: Nodes, facts: Mapping[str, Any], start: Start, scratch: Path
) -> Journal | None:
    """The journal that this rank keeps: the run's on rank 0, a copy in `scratch` on the leaders of other machines, none
    on the other ranks. Collective."""
    with ranks.failing_together():
        if not nodes.is_leader:
            return None
        is_copy = nodes.index > 0
        path = scratch / "journal" if is_copy else folder.journal.folder
        if is_copy or start.checkpoint is None:  # a copy is sent anew; of a run that starts anew, nothing holds
            JournalFiles(path).clear()
        return Journal(path, facts)


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """The run folder, on rank 0 held against other processes; the lock goes with the process, however it ends."""
    with ExitStack() as stack:
        with ranks.failing_together():
            if ranks.rank() == 0:
                stack.enter_context(folder.hold())
        yield

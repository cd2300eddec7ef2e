"""Makes the callbacks of every run: metrics.jsonl, the console, dashboards, the summary."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lfr.config import RunConfig
from megatron_lfr.lfr import Journal
from megatron_lfr.parallel import ranks
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.callbacks import Callback
from megatron_lfr.training.logging import TensorBoard, WeightsAndBiases, console
from megatron_lfr.training.metrics import MetricsFile
from megatron_lfr.training.summary import Summary


def make_callbacks(
    config: RunConfig, folder: RunFolder, journal: Journal | None, others: Sequence[Callback]
) -> list[Callback]:
    """Make the callbacks of a run in `folder`, in the order in which they are called; `others` come last.

    They are called on rank 0, whose journal is the run's; other ranks have none.
    """
    if journal is None or ranks.rank() != 0:
        return []
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
    return [*callbacks, Summary(folder, journal), *others]

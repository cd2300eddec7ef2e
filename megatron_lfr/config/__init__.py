"""The configuration of a run, composed from the dataclass beside each component; that of the loop is here."""

from megatron_lfr.config.deepspeed import deepspeed_settings, fill_batch
from megatron_lfr.config.run import (
    RunConfig,
    parse_run_config,
    read_run_config,
    resolve_schedule,
    run_schedule,
    take_option,
)
from megatron_lfr.config.training import CheckpointConfig, LFRConfig, LoggingConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "LFRConfig",
    "LoggingConfig",
    "RunConfig",
    "TrainingConfig",
    "deepspeed_settings",
    "fill_batch",
    "parse_run_config",
    "read_run_config",
    "resolve_schedule",
    "run_schedule",
    "take_option",
]

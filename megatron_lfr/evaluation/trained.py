"""The model of a run folder, loaded to be evaluated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from megatron_lfr.build import make_model_config, make_stages, make_tokenizer
from megatron_lfr.config import RunConfig, read_run_config
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.engine import ForwardEngine
from megatron_lfr.identity import check_trained_with, open_base
from megatron_lfr.model import Decoder
from megatron_lfr.parallel import ParallelConfig, ParallelState, initialize, ranks
from megatron_lfr.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedModel:
    """A run's model with the weights of one of its checkpoints, complete on every rank."""

    config: RunConfig
    """The run's configuration as evaluation uses it: without its parallel layout, compilation and layer kernels."""
    iteration: int
    engine: ForwardEngine
    parallel: ParallelState
    tokenizer: Tokenizer | None
    """The run's tokenizer; None where it was trained without one."""
    corpus: list[str] | None
    """A digest of each prefix that the run was trained on; None where they are not known."""

    @property
    def model(self) -> Decoder:
        return self.engine.stages[0]

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("the run has no tokenizer, and tasks are text: give --tokenizer-model")
        return self.tokenizer

    @property
    def bos(self) -> int | None:
        """The token that texts start with, as the documents of the corpus do; None where they start with none."""
        return self.text_tokenizer.bos(self.config.data.bos)

    @torch.no_grad()
    def score_next(self, tokens: Tensor, labels: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Call Decoder.score_next with tensors in the host's memory, and return such."""
        device = self.parallel.device
        logprobs, likeliest = self.model.score_next(tokens.to(device), labels.to(device), where.to(device))
        return logprobs.cpu(), likeliest.cpu()


def load_trained(
    run: Path, iteration: int | None = None, batch_size: int | None = None, tokenizer_model: str | None = None
) -> TrainedModel:
    """Load the model of the run folder `run` from the checkpoint of `iteration`, by default the newest complete one.

    Ranks that a launcher started are data parallel. batch_size: blocks that each rank computes at a time, by default
    the run's micro-batch size. Raises ValueError where the folder holds no run or no complete checkpoint.
    """
    folder = RunFolder(run, "--run")
    config = read_config(folder, batch_size, tokenizer_model)
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    parallel = initialize(config.parallel, timedelta(minutes=config.training.distributed_timeout_minutes))
    checkpoint = folder.checkpoint(iteration, parallel.control_group)
    if ranks.rank() == 0:
        check_trained_with(folder, checkpoint, config, model, tokenizer)
    size = config.training.micro_batch_size
    engine = ForwardEngine(
        make_stages(config, model, parallel, initialize_weights=False),
        parallel,
        seq_length=config.data.seq_length,
        micro_batch_size=size,
        global_batch_size=size * parallel.data_parallel_size,
    )
    if base := engine.base_weights():
        open_base(config, checkpoint.state["identity"], parallel.control_group).load_into(
            base, allow_extra=True, rounds=True
        )
    checkpoint.load_into(engine.weights(), allow_extra=True)
    register_fsdp_forward_method(engine.stages[0], "score_next")
    corpus = (checkpoint.state.get("identity") or {}).get("corpus")
    return TrainedModel(config, checkpoint.iteration, engine, parallel, tokenizer, corpus)


def read_config(folder: RunFolder, batch_size: int | None = None, tokenizer_model: str | None = None) -> RunConfig:
    """Read a run's configuration, changed for evaluation by data-parallel ranks that each hold the complete model."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    config = read_run_config(folder, tokenizer_model)
    training = dataclasses.replace(
        config.training,
        micro_batch_size=batch_size or config.training.micro_batch_size,
        global_batch_size=None,
        compile=False,
        layer_kernels="torch",
        attention_backend="auto",
        recompute_granularity=None,
    )
    return dataclasses.replace(config, training=training, parallel=ParallelConfig())

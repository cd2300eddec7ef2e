"""How a model and its data are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ShardingStrategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]
PipelineScheduleName = Literal["1f1b", "interleaved", "gpipe"]


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the process groups. The data-parallel size is the number of ranks divided by the tensor, pipeline and
    context sizes."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (tensor parallelism)."""
    sequence_parallel: bool = False
    """Split norms and residuals by tokens over the tensor-parallel ranks. It has no effect with one tensor-parallel
    rank."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers (pipeline parallelism)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Largest number of layers in a virtual pipeline stage. Each pipeline rank then holds several stages, which
    alternate with those of the other ranks. By default there are no virtual stages."""
    pipeline_schedule: PipelineScheduleName | None = None
    """Order of the micro-batches' forward and backward passes in the pipeline; by default 1f1b, or interleaved where
    there are virtual stages."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (context parallelism)."""
    data_parallel_sharding_strategy: ShardingStrategy | None = None
    """What is sharded over the data-parallel ranks instead of copied: nothing (no_shard, the default), the optimizer's
    state (optim, ZeRO-1), also the gradients (optim_grads, ZeRO-2), also the weights (optim_grads_params, ZeRO-3)."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state; the same as --data-parallel-sharding-strategy optim."""
    num_distributed_optimizer_instances: int = 1
    """Number of complete copies of what is sharded (hybrid sharding). Each copy is spread over an equal part of the
    data-parallel ranks."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; auto takes NCCL on a GPU and gloo on a CPU."""

    @property
    def sharding(self) -> ShardingStrategy:
        """Sharding strategy in force."""
        return self.data_parallel_sharding_strategy or ("optim" if self.use_distributed_optimizer else "no_shard")

    @property
    def schedule(self) -> PipelineScheduleName:
        """Pipeline schedule in force."""
        return self.pipeline_schedule or ("interleaved" if self.num_layers_per_virtual_pipeline_stage else "1f1b")

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that together hold one copy of the model and compute one sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of such sets of ranks; each set computes its own share of a step's blocks."""
        return world_size // self.model_parallel_size

    def num_stages(self, num_layers: int) -> int:
        """Return the number of pipeline stages over all ranks, virtual ones included."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return self.pipeline_model_parallel_size
        per_turn = self.pipeline_model_parallel_size * self.num_layers_per_virtual_pipeline_stage
        return -(-num_layers // per_turn) * self.pipeline_model_parallel_size

    def validate(self, world_size: int) -> None:
        """Check the rules that need nothing but these flags; ValueError names the flag and the legal values."""
        for flag, value in (
            ("--tensor-model-parallel-size", self.tensor_model_parallel_size),
            ("--pipeline-model-parallel-size", self.pipeline_model_parallel_size),
            ("--context-parallel-size", self.context_parallel_size),
            ("--num-layers-per-virtual-pipeline-stage", self.num_layers_per_virtual_pipeline_stage),
            ("--num-distributed-optimizer-instances", self.num_distributed_optimizer_instances),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"{world_size} ranks (WORLD_SIZE) were started: must be a multiple of {self.model_parallel_size} = "
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} x --context-parallel-size {self.context_parallel_size}"
            )
        self._check_pipeline()
        self._check_sharding(self.data_parallel_size(world_size))

    def _check_pipeline(self) -> None:
        virtual = self.num_layers_per_virtual_pipeline_stage
        if virtual is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--num-layers-per-virtual-pipeline-stage {virtual}: needs --pipeline-model-parallel-size of 2 or more"
            )
        if self.pipeline_schedule is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--pipeline-schedule {self.pipeline_schedule}: needs --pipeline-model-parallel-size of 2 or more"
            )
        if (virtual is not None) != (self.schedule == "interleaved"):
            legal = "interleaved" if virtual is not None else "1f1b, gpipe"
            raise ValueError(
                f"--pipeline-schedule {self.schedule} with"
                f"{'' if virtual is not None else 'out'} --num-layers-per-virtual-pipeline-stage; legal: {legal}"
            )

    def _check_sharding(self, data_parallel_size: int) -> None:
        asked = self.data_parallel_sharding_strategy
        if self.use_distributed_optimizer and asked == "no_shard":
            raise ValueError(
                "--data-parallel-sharding-strategy no_shard with --use-distributed-optimizer, which stands for optim"
            )
        if self.pipeline_model_parallel_size > 1 and self.sharding in ("optim_grads", "optim_grads_params"):
            raise ValueError(
                f"--data-parallel-sharding-strategy {self.sharding} with --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}: a pipeline needs whole weights and gradients until its last "
                "micro-batch; legal: no_shard, optim"
            )
        copies = self.num_distributed_optimizer_instances
        if copies > 1 and self.sharding == "no_shard":
            raise ValueError(
                f"--num-distributed-optimizer-instances {copies}: needs --data-parallel-sharding-strategy optim, "
                "optim_grads or optim_grads_params"
            )
        if data_parallel_size % copies:
            raise ValueError(
                f"--num-distributed-optimizer-instances {copies}: must divide the {data_parallel_size} data-parallel "
                "ranks"
            )

    def check_batches(self, num_layers: int, seq_length: int, micro_batch_size: int, micro_batches: int) -> None:
        """Check the layout against the model and the batches; ValueError names the flag and the legal values."""
        stages = self.num_stages(num_layers)
        if stages > num_layers:
            raise ValueError(
                f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size}: {stages} stages for "
                f"--num-layers {num_layers}; every stage needs a layer"
            )
        ranks = self.pipeline_model_parallel_size
        if self.schedule == "1f1b" and micro_batches < stages:
            raise ValueError(
                f"--pipeline-schedule 1f1b: {micro_batches} micro-batches a step on each data-parallel rank; must be "
                f"at least the {stages} stages. Raise --global-batch-size or lower --micro-batch-size"
            )
        if self.schedule == "interleaved" and micro_batches % max(1, micro_batches // ranks):
            raise ValueError(
                f"--pipeline-schedule interleaved: {micro_batches} micro-batches a step on each data-parallel rank; "
                f"must be below {2 * ranks} or a multiple of --pipeline-model-parallel-size {ranks}"
            )
        context, tensor = self.context_parallel_size, self.tensor_model_parallel_size
        if context > 1 and seq_length % (2 * context):
            raise ValueError(f"--seq-length {seq_length}: must be a multiple of 2 x --context-parallel-size {context}")
        tokens = micro_batch_size * seq_length // context
        if self.sequence_parallel and tokens % tensor:
            raise ValueError(
                f"--sequence-parallel: the {tokens} tokens of a micro-batch must be a multiple of "
                f"--tensor-model-parallel-size {tensor}"
            )

"""Settings of the training loop: batches, length, output, checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_lfr.data.corpus.block_values import parse_names
from megatron_lfr.engine.determinism import check_environment
from megatron_lfr.fileio import same_path
from megatron_lfr.lfr import PRESETS, FocusScope
from megatron_lfr.lfr.scores import CLUSTERS
from megatron_lfr.model.fused import KernelPackage, check_package

_LONGEST_TIMEOUT = 365 * 24 * 60


@dataclass(frozen=True)
class LFRConfig:
    """The Learn-Focus-Review schedule."""

    lfr_schedule: str = "lfr"
    """Phases of the run: a preset (lfr, lfr-v1, lfr-v1-2reps, lfr-clusters, uniform, static, learn-only, random-focus,
    focus-only), a YAML file with a list of phases, or such a list itself."""
    train_iters: int | None = None
    """Length of the run in optimizer steps. It scales a schedule whose phases are shares; for any other schedule it is
    not needed, and must equal the total of its phases."""
    train_samples: int | None = None
    """Length of the run in samples (visits of blocks), instead of --train-iters."""
    train_epochs: float | None = None
    """Length of the run in epochs of the corpus, instead of --train-iters; only for a schedule whose phases are
    shares."""
    replay: float = 0.0
    """Share of the samples of the first phase of a segment with new blocks (see `megatron-lfr extend`) that come from
    the other, older blocks, at random."""
    lfr_focus_scope: FocusScope = "global"
    """Where a Focus phase looks for the hard blocks. global: among all blocks; weights in --data-path then count in
    Learn and Review only. per-corpus: in each prefix separately; a prefix gets its weight's share of the samples, or
    without weights its share of the blocks."""
    lfr_scores: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Numbers for the blocks from outside of the run, as NAME=FILE.npy; may be given several times. A phase of the
    schedule uses them by name: score: file:NAME or excess:NAME, weight: file:NAME, and copies, for which NAME is
    copies. One named weight weighs every phase of a preset as well, and guards the Focus of lfr. FILE.npy holds float32
    (for copies uint32), one number for each training block, as commonness and evaluate --split train --per-block write
    it; it is read where it is."""
    lfr_clusters: str | None = None
    """Clusters of content for every Focus with selection clusters, in the place of a k-means on the score: FILE.npy
    with uint32, the number of each training block's cluster. Complete clusters are dropped by their mean score. It is
    kept as --lfr-scores clusters=FILE.npy."""
    lfr_scratch_dir: str | None = None
    """Folder for the files that the ranks of one machine share: the order of the phase, and on every machine but the
    first a copy of the journal. By default it is in the run folder; a local disk is faster."""

    def with_named_clusters(self) -> LFRConfig:
        """Return the same settings with --lfr-clusters among --lfr-scores, by its name."""
        if self.lfr_clusters is None:
            return self
        return replace(self, lfr_clusters=None, lfr_scores=[*self.lfr_scores, f"{CLUSTERS}={self.lfr_clusters}"])

    def scratch(self, run: Path, machine: int) -> Path:
        """Return the folder of the files that the ranks of a machine share. Each run gets its own, even where several
        runs are given the same --lfr-scratch-dir."""
        if self.lfr_scratch_dir is None:
            return run / "scratch" / f"node_{machine}"
        name = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        return Path(self.lfr_scratch_dir) / f"run_{name}" / f"node_{machine}"

    def validate(self) -> None:
        for flag, value in (
            ("--train-iters", self.train_iters),
            ("--train-samples", self.train_samples),
            ("--train-epochs", self.train_epochs),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: must be positive")
        if not 0 <= self.replay < 1:
            raise ValueError(f"--replay {self.replay}: must be at least 0 and below 1")
        if not self.lfr_schedule:
            raise ValueError(f"--lfr-schedule: give a preset ({', '.join(PRESETS)}) or a YAML file")
        parse_names(self.lfr_scores, "--lfr-scores")


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, precision, evaluation and stops."""

    micro_batch_size: int = 1
    """Blocks of one forward and backward pass on each data-parallel rank."""
    global_batch_size: int | None = None
    """Blocks of one optimizer step over all ranks; by default one micro-batch on each."""
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: begin with START blocks a step, and add INCREMENT at equal distances until
    --global-batch-size is reached after SAMPLES samples. All blocks are learned meanwhile; the schedule comes after."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the blocks."""
    bf16: bool = False
    """Compute in bfloat16; weights, gradients and the optimizer's state stay in fp32."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Which activations to recompute in the backward pass instead of keeping them: those of whole layers (full), or
    those of attention only (selective). By default none."""
    compile: bool = False
    """Compile each transformer layer with torch.compile, which fuses the operations between its matrix products and its
    attention. The first step waits for the compiler. Advised on a GPU, except for short runs."""
    deterministic: bool = False
    """Make the same command give the same bits on a GPU, too, by keeping the order of every sum; steps take longer. On
    a CPU, the bits are the same anyway as long as the number of threads is."""
    layer_kernels: KernelPackage = "torch"
    """Where RMSNorm, rotary positions and SwiGLU come from: PyTorch (--compile fuses them), the liger-kernel package,
    or apex (RMSNorm alone). The packages need a GPU."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """What computes attention within documents, and attention on context-parallel ranks: PyTorch's
    scaled_dot_product_attention with a dense mask (sdpa), or its flex_attention without one (flex), which needs a GPU.
    auto takes flex on a GPU wherever sdpa would need a dense mask. Attention over all earlier tokens always uses
    scaled_dot_product_attention."""
    eval_interval: int | None = None
    """Steps between evaluations; the end of every phase and of the run are evaluated anyway."""
    eval_iters: int | None = 100
    """Global batches of one evaluation, spread evenly over the validation split; None evaluates the whole split."""
    max_skipped_steps: int = 10
    """Stop the run after this many consecutive steps whose loss or gradient is not finite."""
    exit_interval: int | None = None
    """Save and exit (code 75) when the step number is a multiple of this number."""
    exit_duration_in_mins: float | None = None
    """Save and exit (code 75) after this many minutes."""
    manual_gc: bool = True
    """Collect Python's garbage on all ranks after the same steps, and at no other time. It has no effect on a single
    rank."""
    manual_gc_interval: int = 100
    """With --manual-gc: steps between collections; 0 collects nothing after the start."""
    distributed_timeout_minutes: int = 10
    """Minutes that a rank waits for the others before it gives up."""

    def validate(self, data_parallel_size: int) -> None:
        for flag, value in (
            ("--micro-batch-size", self.micro_batch_size),
            ("--global-batch-size", self.global_batch_size),
            ("--eval-interval", self.eval_interval),
            ("--eval-iters", self.eval_iters),
            ("--max-skipped-steps", self.max_skipped_steps),
            ("--exit-interval", self.exit_interval),
            ("--exit-duration-in-mins", self.exit_duration_in_mins),
            ("--distributed-timeout-minutes", self.distributed_timeout_minutes),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: must be positive")
        if self.manual_gc_interval < 0:
            raise ValueError(f"--manual-gc-interval {self.manual_gc_interval}: must be 0 or more")
        if self.distributed_timeout_minutes > _LONGEST_TIMEOUT:
            raise ValueError(
                f"--distributed-timeout-minutes {self.distributed_timeout_minutes}: at most {_LONGEST_TIMEOUT}, a year"
            )
        if self.compile and self.layer_kernels != "torch":
            raise ValueError(f"--compile: goes with --layer-kernels torch, not {self.layer_kernels}")
        if self.deterministic and self.layer_kernels != "torch":
            raise ValueError(f"--deterministic: goes with --layer-kernels torch, not {self.layer_kernels}")
        check_package("--layer-kernels", self.layer_kernels)
        if self.deterministic:
            check_environment()
        multiple = self.micro_batch_size * data_parallel_size
        self.check_rampup(data_parallel_size)
        if self.blocks_per_step(data_parallel_size) % multiple:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: must be a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {data_parallel_size} data-parallel ranks = {multiple}"
            )

    def check_rampup(self, data_parallel_size: int) -> None:
        """Check that --rampup-batch-size leads to the global batch size; ValueError names the flag."""
        ramp, end = self.rampup_batch_size, self.blocks_per_step(data_parallel_size)
        if ramp is None:
            return
        multiple = self.micro_batch_size * data_parallel_size
        if len(ramp) != 3 or min(ramp) < 1 or ramp[0] >= end or (end - ramp[0]) % ramp[1]:
            raise ValueError(
                f"--rampup-batch-size {' '.join(map(str, ramp))}: give START INCREMENT SAMPLES, where START and "
                f"some times INCREMENT make --global-batch-size {end}"
            )
        if ramp[0] % multiple or ramp[1] % multiple:
            raise ValueError(
                f"--rampup-batch-size {' '.join(map(str, ramp))}: START and INCREMENT must be multiples of "
                f"--micro-batch-size {self.micro_batch_size} x {data_parallel_size} data-parallel ranks = {multiple}"
            )

    def blocks_per_step(self, data_parallel_size: int) -> int:
        """Return the global batch size in force, in blocks."""
        return self.global_batch_size or self.micro_batch_size * data_parallel_size


@dataclass(frozen=True)
class CheckpointConfig:
    """The run folder."""

    save: str | None = None
    """The run folder. If it already holds a run, that run continues from its newest complete checkpoint."""
    load: str | None = None
    """With --finetune: the run folder whose newest weights the run starts from. Without --finetune, only the folder of
    --save is allowed."""
    finetune: bool = False
    """Start a new run at step 0 from the weights of --load, without its optimizer state and journal."""
    finetune_change: list[str] = field(default_factory=list)
    """With --finetune: names of the settings of the model, the tokenizer or the documents that may differ from those
    the weights were trained with (for example rotary_base reset_attention_mask); all others must agree."""
    ckpt_step: int | None = None
    """With --finetune: the step of --load whose weights the run starts from; by default the newest. Without
    --finetune, only the newest step of the run is allowed: it is `megatron-lfr branch` that goes on from an earlier
    one."""
    no_load_optim: bool = False
    """Leave the optimizer's state of --load behind, as --finetune, which must be given, always does."""
    no_load_rng: bool = False
    """Leave the states of random generators of --load behind, as --finetune, which must be given, always does."""
    save_interval: int | None = None
    """Steps between checkpoints; a checkpoint is written at the end of the run anyway."""
    save_interval_mins: float | None = 15.0
    """Minutes between checkpoints, in addition to those of --save-interval; 0 or None writes none by time."""
    async_save: bool = False
    """Write checkpoints from a copy in host memory while training continues."""
    keep_last: int | None = 3
    """Number of newest checkpoints to keep; None keeps all."""
    save_retain_interval: int | None = None
    """Write a checkpoint at every multiple of this number of steps, and keep it whatever --keep-last says."""
    save_retain_steps: list[int] = field(default_factory=list)
    """Write a checkpoint at each of these steps, and keep it whatever --keep-last says."""

    def retains(self, step: int) -> bool:
        """Return whether the checkpoint of a step is kept for good."""
        interval = self.save_retain_interval
        return step in self.save_retain_steps or (interval is not None and step % interval == 0)

    def check_retained(self, total_steps: int) -> None:
        """ValueError names a step to retain that a run of `total_steps` does not come to."""
        if beyond := [step for step in self.save_retain_steps if step > total_steps]:
            raise ValueError(
                f"--save-retain-steps {beyond[0]}: must lie between 1 and {total_steps}, the run's last step"
            )

    def validate(self) -> None:
        if not self.save:
            raise ValueError("--save: give the run folder; Learn-Focus-Review keeps its journal there")
        if self.finetune and not self.load:
            raise ValueError("--finetune: give the run folder to start from with --load")
        same = bool(self.load) and same_path(self.load or "", self.save)
        if self.load and not self.finetune and not same:
            raise ValueError(
                f"--load {self.load} with --save {self.save}: a run is continued in its own folder, together with "
                "its journal. Give one folder for both, or --finetune to start a new run from those weights"
            )
        if self.finetune and same:
            raise ValueError(f"--finetune: --save {self.save} must be another folder than --load")
        if self.finetune_change and not self.finetune:
            raise ValueError("--finetune-change: goes with --finetune")
        for flag, given in (("--no-load-optim", self.no_load_optim), ("--no-load-rng", self.no_load_rng)):
            if given and not self.finetune:
                raise ValueError(
                    f"{flag}: a run that goes on keeps its complete state, or its losses would not belong to its "
                    "weights; give --finetune too, to start a new run from the weights of --load alone"
                )
        for flag, value in (
            ("--ckpt-step", self.ckpt_step),
            ("--save-interval", self.save_interval),
            ("--keep-last", self.keep_last),
            ("--save-retain-interval", self.save_retain_interval),
            *(("--save-retain-steps", step) for step in self.save_retain_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")
        if self.save_interval_mins is not None and self.save_interval_mins < 0:
            raise ValueError(f"--save-interval-mins {self.save_interval_mins}: must be 0 or more")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run logs while it trains. metrics.jsonl in the run folder is always written."""

    log_interval: int = 100
    """Steps between console lines and entries of metrics.jsonl."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard; by default tensorboard/ in the run folder."""
    wandb_project: str = ""
    """Weights & Biases project; needs the wandb package."""
    wandb_exp_name: str = ""
    """Name of the run in Weights & Biases."""
    callback: list[str] = field(default_factory=list)
    """Callback classes of your own that listen to the run, as package.module:Name (see docs/library.md)."""
    peak_tflops: float | None = None
    """What one device can compute at most, in units of 10^12 floating-point operations a second, for the utilisation
    (MFU) in the log; by default the data sheet's rate of an A100, H100, H200 or B200 in the type of the run."""
    profile: bool = False
    """Record some steps with PyTorch's profiler, as traces in profile/ in the run folder."""
    profile_step_start: int = 10
    """With --profile: number of steps after which the profile begins."""
    profile_step_end: int = 12
    """With --profile: the last step of the profile."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """With --profile: the ranks that record one."""
    print_config: bool = False
    """Print the effective configuration as YAML and exit."""

    def tensorboard(self, default: Path) -> Path:
        """Return the folder for TensorBoard."""
        return Path(self.tensorboard_dir) if self.tensorboard_dir else default

    def validate(self) -> None:
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak-tflops {self.peak_tflops}: must be positive")
        if self.profile and not 0 <= self.profile_step_start < self.profile_step_end:
            raise ValueError(
                f"--profile-step-start {self.profile_step_start} --profile-step-end {self.profile_step_end}: must be "
                "at least 0, and the end after the start"
            )
        if self.log_interval < 1:
            raise ValueError(f"--log-interval {self.log_interval}: must be at least 1")
        if self.wandb_project and find_spec("wandb") is None:
            raise ValueError("--wandb-project: needs the wandb package (pip install wandb)")

"""The configuration of a run, composed of the dataclass beside each component.

Flags are generated from the fields of these dataclasses, and their help from the fields' docstrings. A YAML file
(`--config`) is read first, as if its keys were flags; the command line overrides it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from megatron_lfr.config.deepspeed import apply_deepspeed, deepspeed_settings, effect_notes
from megatron_lfr.config.deepspeed_file import DeepSpeedConfig
from megatron_lfr.config.keys import parse_flags, to_flags
from megatron_lfr.config.main_path import MainPathConfig
from megatron_lfr.config.training import CheckpointConfig, LFRConfig, LoggingConfig, TrainingConfig
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.block_values import parse_names
from megatron_lfr.data.corpus.gpt2_files import name_both
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.fileio import exists
from megatron_lfr.lfr import PRESETS, Phase, Schedule, preset
from megatron_lfr.lfr.schedule import check_effect
from megatron_lfr.lfr.scores import BY_SCORE, CLUSTERS, WEIGHT
from megatron_lfr.megatron_flags import strip_megatron_flags
from megatron_lfr.model.attention import AttentionBackend, choose_backend
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.lora import LoRAConfig
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.model.presets import MODEL_PRESETS
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.run_folder.replacing import current_bytes
from megatron_lfr.run_folder.settings import dump_yaml, parse_yaml


@dataclass(frozen=True)
class RunConfig:
    """Pretrain a decoder, by default a Llama, with Learn-Focus-Review.

    Further flags: --config FILE.yaml reads settings from a file whose keys are flags (the command line overrides it),
    --model-preset NAME takes a model's sizes by name, --vocab-file VOCAB.json and --merge-file MERGES.txt stand for
    --tokenizer-model VOCAB.json,MERGES.txt, and --nproc-per-node N starts N ranks on this machine (use torchrun for
    several machines).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lfr: LFRConfig = field(default_factory=LFRConfig)
    main_path: MainPathConfig = field(default_factory=MainPathConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Check every rule that needs no file of the corpus; ValueError names the flag and the legal values."""
        values = [
            (name, one)
            for name, value in self.to_flat().items()
            for one in (value if isinstance(value, list) else [value])
        ]
        for name, value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a finite number")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between -2^63 and 2^63")
        self.model.validate()
        self.data.validate()
        self.lfr.validate()
        self.main_path.validate()
        self.loss.validate()
        self.dropout.validate()
        self.optimizer.validate()
        self._check_lora()
        self.parallel.validate(world_size)
        self.model.validate(self.parallel.tensor_model_parallel_size)
        self.deepspeed.validate()
        if self.deepspeed.deepspeed:
            deepspeed_settings(self, world_size)
        data_parallel_size = self.parallel.data_parallel_size(world_size)
        self.training.validate(data_parallel_size)
        rows = self.training.blocks_per_step(data_parallel_size) // data_parallel_size
        self.parallel.check_batches(
            self.model.num_layers,
            self.data.seq_length,
            self.training.micro_batch_size,
            rows // self.training.micro_batch_size,
        )
        self.attention_backend(self.parallel.distributed_backend != "gloo" and torch.cuda.is_available())
        self.checkpoint.validate()
        self.logging.validate()
        if self.data.seq_length > self.model.max_position_embeddings:
            raise ValueError(
                f"--seq-length {self.data.seq_length}: longer than --max-position-embeddings "
                f"{self.model.max_position_embeddings}"
            )
        run_schedule(self.lfr)

    def _check_lora(self) -> None:
        """Check that adapters have an engine and an optimizer that can train them."""
        is_rite = self.optimizer.optimizer == "lora-rite"
        if self.lora.lora_rank is None:
            if is_rite:
                raise ValueError("--optimizer lora-rite: updates the adapters of --lora-rank; give it, too")
            if self.lora.lora_load is not None:
                raise ValueError(f"--lora-load {self.lora.lora_load}: goes with --lora-rank")
            return
        self.lora.validate(self.model)
        if self.deepspeed.deepspeed and is_rite:
            raise ValueError("--optimizer lora-rite: DeepSpeed computes AdamW only; leave out --deepspeed")
        if self.deepspeed.deepspeed and self.parallel.sharding == "optim_grads_params":
            raise ValueError("--lora-rank: goes with DeepSpeed's ZeRO stages 0 to 2, or without --deepspeed")

    def attention_backend(self, on_gpu: bool) -> AttentionBackend:
        """Choose what computes attention; ValueError where --attention-backend asks for one that cannot run here."""
        return choose_backend(
            self.training.attention_backend,
            on_gpu=on_gpu,
            has_documents=self.data.reset_attention_mask,
            has_window=self.model.window(self.data.seq_length) is not None,
            context_ranks=self.parallel.context_parallel_size,
            is_compiled=self.training.compile,
            head_dim=self.model.head_dim,
            has_dropout=self.dropout.attention_dropout > 0,
        )

    def to_flat(self) -> dict[str, Any]:
        """Return every setting by the name of its flag, for config.yaml."""
        flat: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            flat.update(dataclasses.asdict(getattr(self, section.name)))
        return flat

    def to_yaml(self) -> str:
        """Return every setting as YAML that --config reads."""
        return dump_yaml(self.to_flat())


def resolve_schedule(text: str) -> Schedule:
    """Return the schedule that --lfr-schedule gives: a preset's name, a YAML file, or a YAML list of phases itself."""
    if text in PRESETS:
        return preset(text)
    try:
        is_list = text.lstrip().startswith("[")
        if not is_list and not (exists(text) and Path(text).is_file()):
            raise ValueError(f"neither a preset ({', '.join(PRESETS)}) nor a file")
        rows = parse_yaml(text if is_list else Path(text).read_bytes())
        if not isinstance(rows, list):
            raise ValueError("expected a list of phases")
        schedule = Schedule.from_dicts(rows)
        check_effect(schedule.phases)
        return schedule
    except ValueError as error:
        raise ValueError(f"--lfr-schedule {text}: {error}") from None


def run_schedule(lfr: LFRConfig) -> Schedule:
    """Return the schedule of a run: that of --lfr-schedule, every phase of a preset by the array `weight` of
    --lfr-scores where there is one, which then guards each Focus that may be declined, and every selection by clusters
    by the array `clusters` where there is one."""
    schedule, flag = resolve_schedule(lfr.lfr_schedule), "--lfr-scores"
    names = parse_names(lfr.lfr_scores, flag)
    if CLUSTERS in names:
        schedule = Schedule(tuple(_by_content(phase) for phase in schedule.phases))
    try:
        return Schedule(tuple(weighted_as_preset(lfr, phase) for phase in schedule.phases))
    except ValueError as error:
        raise ValueError(f"{flag} {WEIGHT}: weighs every phase of --lfr-schedule {lfr.lfr_schedule}: {error}") from None


def weighted_as_preset(lfr: LFRConfig, phase: Phase) -> Phase:
    """Return a phase as the array `weight` weighs those of a preset; as it is without the array, or a preset."""
    if lfr.lfr_schedule not in PRESETS or WEIGHT not in parse_names(lfr.lfr_scores, "--lfr-scores"):
        return phase
    array = f"file:{WEIGHT}"
    return dataclasses.replace(phase, weight=array, guard=array if phase.may_be_declined else phase.guard)


def _by_content(phase: Phase) -> Phase:
    is_by_score = phase.kind == "focus" and phase.selection == "clusters" and phase.cluster_by == BY_SCORE
    return dataclasses.replace(phase, cluster_by=f"file:{CLUSTERS}") if is_by_score else phase


def parse_run_config(argv: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Parse a command line into the configuration of a run, and notes on Megatron flags that were accepted.

    Raises ValueError for anything that is wrong with `--config`, `--model-preset` or a flag that is refused; an
    unknown or malformed flag exits with tyro's message.
    """
    rest, notes = strip_megatron_flags(argv)
    config_file, rest = take_option(rest, "--config")
    model_preset, rest = take_option(rest, "--model-preset")
    rest = _with_tokenizer_files(rest)
    from_file: list[str] = []
    if config_file is not None:
        file_preset, from_file = _yaml_to_argv(Path(config_file))
        model_preset = model_preset or file_preset

    def parse(config: RunConfig) -> RunConfig:
        if from_file:
            config = parse_flags(RunConfig, from_file, f"--config {config_file}", config)
        return _parse(rest, config)

    default = _preset_config(model_preset)
    config = parse(default)
    if config.deepspeed.deepspeed and config.deepspeed.deepspeed_config:
        file = config.deepspeed
        # The same object: what it has read is not read again.
        config = dataclasses.replace(parse(apply_deepspeed(default, file.values)), deepspeed=file)
        notes += [f"--deepspeed-config: {note}" for note in effect_notes(file.values)]
    return dataclasses.replace(config, lfr=config.lfr.with_named_clusters()), notes


def read_run_config(folder: RunFolder, tokenizer_model: str | None = None) -> RunConfig:
    """Read the configuration of a run, with the paths of its corpus as `RunFolder.settings` resolves them.

    tokenizer_model: where the run's tokenizer is now, if it was moved. Raises ValueError where the folder holds no run.
    """
    config = parse_settings(folder.settings(), str(folder.config_file))
    data = dataclasses.replace(config.data, tokenizer_model=tokenizer_model or config.data.tokenizer_model)
    return dataclasses.replace(config, data=data)


def parse_settings(settings: Mapping[str, Any], source: str) -> RunConfig:
    """Return the configuration that settings give, by the names of their flags. A ValueError begins with `source`."""
    preset_name, argv = _split_preset(settings, source)
    try:
        default = _preset_config(preset_name)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    config = parse_flags(RunConfig, argv, source, default)
    return dataclasses.replace(config, lfr=config.lfr.with_named_clusters())


def _preset_config(name: str | None) -> RunConfig:
    """Return the default configuration, with the sizes of a model preset."""
    if name is None:
        return RunConfig()
    if name not in MODEL_PRESETS:
        raise ValueError(f"--model-preset {name}: choose from {', '.join(MODEL_PRESETS)}")
    return RunConfig(model=MODEL_PRESETS[name])


def _parse(argv: Sequence[str], default: RunConfig) -> RunConfig:
    config: RunConfig = tyro.cli(
        RunConfig,
        args=list(argv),
        default=default,
        prog="megatron-lfr train",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    return config


def _with_tokenizer_files(argv: Sequence[str]) -> list[str]:
    """Return the command line with --vocab-file and --merge-file as --tokenizer-model."""
    vocabulary, rest = take_option(argv, "--vocab-file")
    merges, rest = take_option(rest, "--merge-file")
    files = name_both(vocabulary, merges)
    if files is None:
        return rest
    if take_option(rest, "--tokenizer-model")[0] is not None:
        raise ValueError("give --tokenizer-model, or --vocab-file and --merge-file, not both")
    return [*rest, "--tokenizer-model", files]


def take_option(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `flag` (the last one counts), and the command line without it."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, given = word.partition("=")
        if name.replace("_", "-") != flag:
            rest.append(word)
        elif equals:
            value = given
        else:
            value = next(words, None)
            if value is None:
                raise ValueError(f"{flag}: needs a value")
    return value, rest


def _yaml_to_argv(path: Path) -> tuple[str | None, list[str]]:
    """Turn a configuration file into (model preset, flags)."""
    try:
        settings = parse_yaml(current_bytes(path.parent, path.name))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: expected a mapping of flags to values")
    return _split_preset(settings, f"--config {path}")


def _split_preset(settings: Mapping[str, Any], source: str) -> tuple[str | None, list[str]]:
    """Turn settings into (model preset, flags). A ValueError begins with `source`."""
    chosen = settings.get("model_preset", settings.get("model-preset"))
    return (None if chosen is None else str(chosen)), to_flags(settings, RunConfig, source, ["model_preset"])

"""`megatron-lfr convert from-peft`: adapters of the `peft` package as a run folder beside that of their base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_lfr.build import make_model_config, make_tokenizer
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import read_run_config
from megatron_lfr.fileio import fsync_file, new_folder
from megatron_lfr.huggingface.adapters import Adapter, adapters
from megatron_lfr.huggingface.files import read_header
from megatron_lfr.huggingface.json_values import integer, number, read_json_object
from megatron_lfr.huggingface.names import check_finite
from megatron_lfr.huggingface.stream import Entry, SafetensorsStream
from megatron_lfr.huggingface.to_peft import CONFIG, WEIGHTS
from megatron_lfr.identity import lora_facts, weights_identity
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.lora import LoRAConfig, legal_targets
from megatron_lfr.run_folder import RunFolder

_FILE = "model-00001-of-00001.safetensors"
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias")
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type"),
    *("init_lora_weights", "lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules", "loftq_config"),
    *("layers_pattern", "layers_to_transform", "megatron_core", "qalora_group_size", "runtime_config"),
)
"""Keys of adapter_config.json that say nothing about what the adapters compute, beyond which tensors there are."""


@dataclass(frozen=True)
class FromPeft:
    """Read adapters of the peft package into a run folder, for evaluate, for train --lora-load, and for convert to-hf
    --merge."""

    input: Path
    """The folder: adapter_config.json and adapter_model.safetensors."""
    base: Path
    """The run folder of the model that they are for, as convert from-hf or train makes it."""
    output: Path
    """The run folder to make; it must not exist yet."""
    iteration: int | None = None
    """Iteration of the base's checkpoint; by default that of the newest complete one."""


def load_adapters(options: FromPeft) -> None:
    """Convert. Raises ValueError or OSError for anything that is wrong, and then leaves no output."""
    if not options.input.is_dir():
        raise ValueError(f"--input {options.input}: no such folder")
    settings = read_json_object(options.input / CONFIG)
    base = read_run_config(RunFolder(options.base, "--base"))
    if base.lora.lora_rank is not None:
        raise ValueError(f"--base {options.base}: holds adapters alone, no model")
    tokenizer = make_tokenizer(base.data)
    model = make_model_config(base, tokenizer)
    try:
        lora = _read_config(settings)
    except ValueError as error:
        raise ValueError(f"{options.input / CONFIG}: {error}") from None
    lora, pairs = _match(options.input / WEIGHTS, lora, model)
    checkpoint = dataclasses.replace(
        base.checkpoint, load=str(options.base.absolute()), finetune=True, ckpt_step=options.iteration
    )
    config = dataclasses.replace(base, lora=lora, checkpoint=checkpoint)
    fingerprint = None if tokenizer is None else tokenizer.fingerprint
    identity = {**weights_identity(model, fingerprint), **lora_facts(config, model)}
    with new_folder(options.output) as folder:
        run = RunFolder(folder)
        _write_checkpoint(run.checkpoint_folder, options.input / WEIGHTS, pairs, model, lora, identity)
        run.write_config(config.to_flat())
    print(f"{options.output}: {len(pairs)} adapters of rank {lora.lora_rank} for {options.base}")


def _read_config(settings: Mapping[str, Any]) -> LoRAConfig:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}; only LORA can be read")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}; only none can be read")
    for key, value in settings.items():
        if value and key not in (*_READ, *_WITHOUT_EFFECT):
            raise ValueError(f"{key} is {value!r}; adapters with it cannot be read")
    rank, alpha = integer(settings, "r"), number(settings, "lora_alpha")
    # Rank-stabilised LoRA divides by the root of the rank.
    return LoRAConfig(lora_rank=rank, lora_alpha=alpha * rank**0.5 if settings.get("use_rslora") else alpha)


def _match(path: Path, lora: LoRAConfig, model: ModelConfig) -> tuple[LoRAConfig, list[Adapter]]:
    """Find out which modules the file's adapters are for; ValueError for one that is missing or unknown."""
    headers = read_header(path)
    by_target = {
        name: dataclasses.replace(lora, lora_target=name if model.has_rope or name not in "qkv" else "q,k,v")
        for name in legal_targets(model)
    }
    present = [
        name for name, one in by_target.items() if any(pair.peft_names()[0] in headers for pair in adapters(model, one))
    ]
    if not present:
        raise ValueError(f"{path}: holds no adapter of a module of the base")
    lora = dataclasses.replace(lora, lora_target=",".join(present))
    lora.validate(model)
    assert lora.lora_rank is not None
    pairs = list(adapters(model, lora))
    shapes = {
        name: list(shape)
        for pair in pairs
        for name, shape in zip(pair.peft_names(), pair.shapes(lora.lora_rank), strict=True)
    }
    for name, shape in shapes.items():
        if name not in headers:
            raise ValueError(f"{path}: {name} is missing; every layer must have the same adapters")
        if headers[name][1] != shape:
            raise ValueError(f"{path}: {name} is {headers[name][1]}; for the base it should be {shape}")
    if unknown := sorted(headers.keys() - shapes.keys()):
        raise ValueError(f"{path}: holds {unknown[0]}, which the base has no place for")
    return lora, pairs


def _write_checkpoint(
    root: Path, source: Path, pairs: list[Adapter], model: ModelConfig, lora: LoRAConfig, identity: dict[str, Any]
) -> None:
    rank = lora.lora_rank or 0

    def write(folder: Path) -> list[str]:
        entries = [
            Entry(name, shape, torch.float32)
            for pair in pairs
            for name, shape in zip(pair.names(), pair.shapes(rank), strict=True)
        ]
        with safe_open(source, framework="pt") as file, SafetensorsStream(folder / _FILE, entries) as stream:
            for pair in pairs:
                factors = [file.get_tensor(name).float() for name in pair.peft_names()]
                for name, factor in zip(pair.peft_names(), factors, strict=True):
                    check_finite(str(source), name, factor)
                for name, factor in zip(pair.names(), (factors[0], pair.b_to_ours(factors[1], model)), strict=True):
                    stream.write(name, factor.contiguous())
        fsync_file(folder / _FILE)
        return [_FILE]

    CheckpointStore(root, keep=None).save_files(0, write, {"source": "convert from-peft", "identity": identity})

"""`megatron-lfr convert to-peft`: the adapters of a run as a folder that the `peft` package loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lfr.build import make_model_config, make_tokenizer
from megatron_lfr.checkpoint.tensors import StoredTensors
from megatron_lfr.config import read_run_config
from megatron_lfr.fileio import fsync_file, new_folder, write_atomic
from megatron_lfr.huggingface.adapters import Adapter, adapters
from megatron_lfr.huggingface.names import check_finite
from megatron_lfr.huggingface.stream import Entry, SafetensorsStream
from megatron_lfr.identity import check_trained_with
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.lora import LoRAConfig, adapter_parameters
from megatron_lfr.run_folder import RunFolder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class ToPeft:
    """Write a run's adapters as a folder that the peft package loads."""

    run: Path
    """The run folder, of a run with --lora-rank."""
    output: Path
    """The folder to make; it must not exist yet."""
    iteration: int | None = None
    """Iteration of the checkpoint; by default that of the newest complete one."""
    base_model: str | None = None
    """Folder or hub name of the Hugging Face model that the adapters are for, written as base_model_name_or_path."""
    tokenizer_model: str | None = None
    """Where the run's tokenizer is now, if it was moved."""


def export_adapters(options: ToPeft) -> None:
    """Convert. Raises ValueError or OSError for anything that is wrong, and then leaves no output."""
    run = RunFolder(options.run, "--run")
    config = read_run_config(run, options.tokenizer_model)
    if config.lora.lora_rank is None:
        raise ValueError(f"--run {options.run}: has no adapters; convert to-hf writes its weights")
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    checkpoint = run.checkpoint(options.iteration)
    check_trained_with(run, checkpoint, config, model, tokenizer)
    pairs, stored = list(adapters(model, config.lora)), StoredTensors(checkpoint.folder)
    with new_folder(options.output) as folder:
        _write_weights(folder / WEIGHTS, pairs, stored, model, config.lora.lora_rank)
        settings = _peft_config(model, config.lora, pairs, options.base_model)
        write_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
    count = adapter_parameters(model, config.lora)
    print(f"{options.output}: iteration {checkpoint.iteration}, {len(pairs)} adapters, {count:,} parameters")


def _write_weights(path: Path, pairs: list[Adapter], stored: StoredTensors, model: ModelConfig, rank: int) -> None:
    entries = [
        Entry(name, shape, torch.float32)
        for pair in pairs
        for name, shape in zip(pair.peft_names(), pair.shapes(rank), strict=True)
    ]
    with SafetensorsStream(path, entries) as stream:
        for name, tensor in _tensors(pairs, stored, model, rank):
            stream.write(name, tensor)
    fsync_file(path)


def _tensors(
    pairs: list[Adapter], stored: StoredTensors, model: ModelConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    for pair in pairs:
        a, b = (stored.read(name, shape) for name, shape in zip(pair.names(), pair.shapes(rank), strict=True))
        for name, factor in zip(pair.peft_names(), (a, pair.b_to_theirs(b, model)), strict=True):
            check_finite(f"--run: the checkpoint's {pair.ours}", name, factor)
            yield name, factor


def _peft_config(model: ModelConfig, lora: LoRAConfig, pairs: list[Adapter], base: str | None) -> dict[str, Any]:
    """Return the configuration. Modules are named by the ends of their names: GPT-2 has two c_proj in a layer."""
    ends = [".".join(pair.theirs.split(".")[-2:]) for pair in pairs]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not model.has_rope,  # GPT-2's weights are [inputs, outputs]
        "target_modules": sorted(set(ends)),
        "inference_mode": True,
    }

"""`megatron-lfr convert to-hf`: the weights of a run as a folder that transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_lfr.build import make_model_config, make_tokenizer
from megatron_lfr.checkpoint import Checkpoint
from megatron_lfr.checkpoint.tensors import StoredTensors
from megatron_lfr.config import RunConfig, read_run_config
from megatron_lfr.data.corpus.special_tokens import Role
from megatron_lfr.data.corpus.tokenizer import FileTokenizer, Tokenizer
from megatron_lfr.fileio import check_space, new_folder, write_atomic
from megatron_lfr.huggingface.adapters import MergedWeights, WeightReader
from megatron_lfr.huggingface.config import to_hf_config
from megatron_lfr.huggingface.json_values import read_json_object
from megatron_lfr.huggingface.names import Weight, check_finite, to_theirs, weights
from megatron_lfr.huggingface.stream import Entry, SafetensorsStream, into_shards
from megatron_lfr.huggingface.tokenizer_files import GENERATION, copy_chat, generation_settings
from megatron_lfr.huggingface.verify import check_transformers, compare_tokenizers, verify
from megatron_lfr.identity import check_trained_with, open_base
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.run_folder import RunFolder

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ToHF:
    """Write a run's weights as a folder that transformers loads: safetensors, config.json, the tokenizer."""

    run: Path
    """The run folder to convert."""
    output: Path
    """The Hugging Face folder to make; it must not exist yet."""
    iteration: int | None = None
    """Iteration of the checkpoint; by default that of the newest complete one."""
    tokenizer_model: str | None = None
    """Where the run's tokenizer is now, if it was moved."""
    max_shard_size: str = "5GB"
    """Largest size of the weights in one file: a number and KB, MB or GB."""
    model_type: str | None = None
    """Family of transformers' models to write the weights as, where several can be this model; by default the first of
    llama, mistral, qwen2, qwen3, olmo2, gpt2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are written; a run's weights are float32."""
    merge: bool = False
    """Write the weights of a run's base with its adapters added, for a run of --lora-rank; convert to-peft writes
    adapters apart."""
    verify: bool = False
    """Compare the run's logits with those that transformers computes from the new folder. This needs memory for both
    models."""


def export(options: ToHF) -> None:
    """Convert. Raises ValueError or OSError for anything that is wrong, and then leaves no output."""
    shard_bytes = _parse_size(options.max_shard_size)
    if options.verify:
        check_transformers()
    run = RunFolder(options.run, "--run")
    config = read_run_config(run, options.tokenizer_model)
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    eod, bos = (None, None) if tokenizer is None else (tokenizer.eod, tokenizer.bos(config.data.bos))
    hf_config = to_hf_config(model, options.dtype, eod, bos, options.model_type)
    checkpoint = run.checkpoint(options.iteration)
    check_trained_with(run, checkpoint, config, model, tokenizer)
    stored = _open_weights(options, config, model, checkpoint)
    for weight in weights(model):
        stored.check(f"model.{weight.ours}", weight.shape(model))
    dtype: torch.dtype = getattr(torch, options.dtype)
    check_space("--output", options.output, sum(entry.nbytes for entry in _entries(weights(model), dtype)))
    with new_folder(options.output) as folder:
        files = _write_weights(folder, stored, model, dtype, shard_bytes)
        _write_json(folder / "config.json", hf_config)
        marks: dict[Role, int | None] = {"bos": bos, "eos": eod}
        origin = tokenizer.path if isinstance(tokenizer, FileTokenizer) and tokenizer.has_neighbours else None
        _write_json(folder / GENERATION, generation_settings(origin, marks))
        note = _write_tokenizer(folder, tokenizer, marks, model.max_position_embeddings)
        if options.verify:
            print(verify(stored, model, folder, dtype))
            if tokenizer is not None and note is None:
                print(compare_tokenizers(tokenizer, folder))
    print(f"{options.output}: iteration {checkpoint.iteration}, {model.num_parameters():,} parameters, {files} files")
    if note:
        print(note)


def _open_weights(options: ToHF, config: RunConfig, model: ModelConfig, checkpoint: Checkpoint) -> WeightReader:
    """Open the weights to write: a checkpoint's own, or with --merge those of its base with its adapters."""
    stored, has_adapters = StoredTensors(checkpoint.folder), config.lora.lora_rank is not None
    if options.merge != has_adapters:
        raise ValueError(
            "--merge: the run has no adapters"
            if options.merge
            else f"--run {options.run}: holds adapters; --merge adds them to their base, convert to-peft writes them"
        )
    if not has_adapters:
        return stored
    base = open_base(config, checkpoint.state["identity"], None)
    return MergedWeights(StoredTensors(base.folder), stored, model, config.lora)


def _write_weights(folder: Path, stored: WeightReader, model: ModelConfig, dtype: torch.dtype, limit: int) -> int:
    """Write the weights, with one of ours in memory at a time; returns the number of files."""
    model_weights = weights(model)
    shards = into_shards(_entries(model_weights, dtype), limit)
    tensors = _tensors(model_weights, stored, model, dtype)
    names = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsStream(folder / file, shard) as stream:
            for entry in shard:
                stream.write(*next(tensors))
                names[entry.name] = file
    if len(shards) > 1:
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": names}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(shards)


def _tensors(
    model_weights: list[Weight], stored: WeightReader, model: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) in the order of writing. Raises ValueError for a tensor that is not finite."""
    for weight in model_weights:
        ours = stored.read(f"model.{weight.ours}", weight.shape(model))
        for name, part in zip(weight.theirs, to_theirs(weight, ours, model), strict=True):
            check_finite(f"--run: the checkpoint's {weight.ours}", name, part)
            yield name, part.to(dtype)


def _entries(model_weights: list[Weight], dtype: torch.dtype) -> list[Entry]:
    pairs = (pair for weight in model_weights for pair in zip(weight.theirs, weight.shapes, strict=True))
    return [Entry(name, shape, dtype) for name, shape in pairs]


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer | None, marks: dict[Role, int | None], longest: int
) -> str | None:
    """Copy the tokenizer; its tokenizer_config.json names the tokens that ended and started the run's documents.

    Returns a note where there is no tokenizer to copy, or where transformers will start texts with another token.
    """
    if not isinstance(tokenizer, FileTokenizer):
        what = "none, so that generation_config.json names no end" if tokenizer is None else "the one of plain bytes"
        return f"No tokenizer was written: the run has {what}."
    tokenizer.write(folder / "tokenizer.json")
    beside = tokenizer.path.with_name("tokenizer_config.json")
    if tokenizer.has_neighbours:
        copy_chat(tokenizer.path, folder)
    settings = {
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types
        **(read_json_object(beside) if tokenizer.has_neighbours and beside.is_file() else {}),
        # A specific class would tokenize some texts in another way than tokenizer.json and the run do.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for role, number in marks.items():
        if number is not None:
            settings[f"{role}_token"] = tokenizer.token(number)
    settings.pop("auto_map", None)  # it names such a class
    _write_json(folder / "tokenizer_config.json", settings)
    added_bos = tokenizer.bos(None)
    if added_bos == marks["bos"]:
        return None
    ours, theirs = ("no token" if number is None else tokenizer.token(number) for number in (marks["bos"], added_bos))
    return (
        f"The run's documents started with {ours}, but transformers starts texts with {theirs}: see add_special_tokens"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--max-shard-size {text}: expected a number and {', '.join(_UNITS)}, as in 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])

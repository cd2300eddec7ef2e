"""`megatron-lfr convert from-hf`: turns a Hugging Face folder into a run folder whose weights a new run starts from."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.nn import functional as F

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint.tensors import StoredTensors
from megatron_lfr.config import RunConfig
from megatron_lfr.data.config import DataConfig
from megatron_lfr.fileio import check_space, fsync_file, new_folder
from megatron_lfr.huggingface.config import from_hf_config
from megatron_lfr.huggingface.files import WeightFiles
from megatron_lfr.huggingface.json_values import read_json_object
from megatron_lfr.huggingface.names import to_ours, weights
from megatron_lfr.huggingface.stream import Entry, SafetensorsStream
from megatron_lfr.huggingface.tokenizer_files import FolderTokenizer, find_tokenizer
from megatron_lfr.huggingface.verify import check_transformers, compare_tokenizers, verify
from megatron_lfr.identity import weights_identity
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.run_folder import RunFolder

_FILE = "model-00001-of-00001.safetensors"
_TOKENIZER = "tokenizer"
_REMAINING_FLAGS = "--input and --output-prefix; --data-path, --save, --lr, the batch's and the run's size"


@dataclass(frozen=True)
class FromHF:
    """Read a model from a Hugging Face folder into a run folder, for `train --load RUN --finetune`."""

    input: Path
    """The Hugging Face folder: config.json, safetensors files, and tokenizer.json if there is one."""
    output: Path
    """The run folder to make; it must not exist yet."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token, where the folder's files do not agree on one."""
    allow_config_key: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Accept this key of config.json although it is unknown here, because it does not change what the model computes.
    Give the flag once for each key."""
    verify: bool = False
    """Compare our logits with those that transformers computes from the input folder. This needs memory for both
    models."""


def load(options: FromHF) -> None:
    """Convert. Raises ValueError or OSError for anything that is wrong, and then leaves no output."""
    if not options.input.is_dir():
        raise ValueError(f"--input {options.input}: no such folder")
    if options.verify:
        check_transformers()
    settings = read_json_object(options.input / "config.json")
    try:
        model, notes = from_hf_config(settings, options.allow_config_key)
    except ValueError as error:
        raise ValueError(f"{options.input / 'config.json'}: {error}") from None
    assert model.vocab_size is not None
    tokenizer = find_tokenizer(options.input, model.vocab_size, options.eod_token)
    files = WeightFiles(options.input, model)
    check_space("--output", options.output, 4 * model.num_parameters())
    with new_folder(options.output) as folder:
        if tokenizer is not None:
            tokenizer.copy(folder / _TOKENIZER)
        fingerprint = None if tokenizer is None else tokenizer.tokenizer.fingerprint
        run = RunFolder(folder)
        _write_checkpoint(run.checkpoint_folder, files, model, weights_identity(model, fingerprint))
        config = RunConfig(model=model, data=_data(options.output, tokenizer, model))
        run.write_config(config.to_flat())
        if options.verify:
            print(verify(StoredTensors(run.checkpoint().folder), model, options.input, torch.float32))
            if tokenizer is not None:
                print(compare_tokenizers(tokenizer.tokenizer, options.input))
    for note in [*(f"config.json: {note}" for note in notes), *_notes_on_tokenizer(options.input, tokenizer)]:
        print(f"note: {note}")
    print(f"{options.output}: {model.num_parameters():,} parameters. Train with (...: {_REMAINING_FLAGS})")
    if tokenizer is not None:
        print(f"  {_preprocess_command(config.data)}")
    print(f"  {_train_command(options.output, tokenizer)}")


def _write_checkpoint(root: Path, files: WeightFiles, model: ModelConfig, identity: dict[str, Any]) -> None:
    def write(folder: Path) -> list[str]:
        model_weights = weights(model)
        entries = [Entry(f"model.{weight.ours}", weight.shape(model), torch.float32) for weight in model_weights]
        with SafetensorsStream(folder / _FILE, entries) as stream:
            for weight, entry in zip(model_weights, entries, strict=True):
                tensor = to_ours(weight, files.read(weight), model).contiguous()
                if missing := entry.shape[0] - len(tensor):  # the vocabulary's padding
                    tensor = F.pad(tensor, (0, 0, 0, missing))
                stream.write(entry.name, tensor)
        fsync_file(folder / _FILE)
        return [_FILE]

    CheckpointStore(root, keep=None).save_files(0, write, {"source": "convert from-hf", "identity": identity})


def _data(output: Path, tokenizer: FolderTokenizer | None, model: ModelConfig) -> DataConfig:
    """Return the data part of the run's configuration: the tokenizer, if there is one, and a block length that the
    model's positions cover."""
    data = DataConfig()
    data = dataclasses.replace(data, seq_length=min(data.seq_length, model.max_position_embeddings))
    if tokenizer is None:
        return data
    where = str((output / _TOKENIZER).absolute())
    return dataclasses.replace(data, tokenizer_model=where, eod_token=tokenizer.eod_token, bos=tokenizer.adds_bos)


def _notes_on_tokenizer(folder: Path, tokenizer: FolderTokenizer | None) -> list[str]:
    if tokenizer is not None:
        return tokenizer.notes
    model = " (tokenizer.model is not read; transformers' AutoTokenizer and save_pretrained write tokenizer.json)"
    return [f"no tokenizer.json, so the run has no tokenizer{model if (folder / 'tokenizer.model').exists() else ''}"]


def _preprocess_command(data: DataConfig) -> str:
    """Return the command that makes a corpus for the run, whose documents end with the run's token."""
    flags = f"--tokenizer {shlex.quote(str(data.tokenizer_model))} --eod-token {shlex.quote(data.eod_token or 'TOKEN')}"
    return f"megatron-lfr preprocess {flags} ..."


def _train_command(output: Path, tokenizer: FolderTokenizer | None) -> str:
    """Return the command that trains from the run."""
    eod = " --eod-token TOKEN" if tokenizer is not None and tokenizer.eod_token is None else ""
    config, run = shlex.quote(str(output / "config.yaml")), shlex.quote(str(output))
    return f"megatron-lfr train --config {config} --load {run} --finetune{eod} ..."

"""`megatron-lfr convert from-hf`: a Hugging Face folder as a run folder, whose weights a new run starts from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.tokenizer import load_tokenizer
from megatron_lfr.fileio import check_space, fsync_file, new_folder, write_atomic
from megatron_lfr.huggingface.config import from_hf_config, read_json_object
from megatron_lfr.huggingface.files import WeightFiles
from megatron_lfr.huggingface.names import to_ours, weights
from megatron_lfr.huggingface.stream import Entry, SafetensorsStream
from megatron_lfr.huggingface.verify import check_transformers, verify
from megatron_lfr.model.config import ModelConfig
from megatron_lfr.training.run import dump_config

_FILE = "model-00001-of-00001.safetensors"
_TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class FromHF:
    """Read a Llama from a Hugging Face folder into a run folder, for `train --load RUN --finetune`."""

    input: Path
    """The folder: config.json, safetensors, tokenizer.json if there is one."""
    output: Path
    """The run folder to make."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token, where the folder's files do not agree on one."""
    verify: bool = False
    """Compare the logits with those that transformers computes from the input. Needs memory for both models."""


def load(options: FromHF) -> None:
    """Convert. ValueError or OSError for anything that is wrong; then nothing is there under the output's name."""
    if not options.input.is_dir():
        raise ValueError(f"--input {options.input}: no such folder")
    if options.verify:
        check_transformers()
    settings = read_json_object(options.input / "config.json")
    try:
        model = from_hf_config(settings)
    except ValueError as error:
        raise ValueError(f"{options.input / 'config.json'}: {error}") from None
    files = WeightFiles(options.input, model)
    check_space("--output", options.output, 4 * model.num_parameters())
    with new_folder(options.output) as folder:
        data = _copy_tokenizer(options, folder)
        _write_checkpoint(folder / "checkpoints", files, model)
        write_atomic(folder / "config.yaml", dump_config(RunConfig(model=model, data=data)))
        if options.verify:
            checkpoint = CheckpointStore(folder / "checkpoints", keep=None).newest_whole()
            assert checkpoint is not None
            print(verify(checkpoint.folder, model, options.input, torch.float32))
    print(f"{options.output}: {model.num_parameters():,} parameters. Train with")
    print(f"  megatron-lfr train --config {options.output}/config.yaml --load {options.output} --finetune ...")


def _write_checkpoint(root: Path, files: WeightFiles, model: ModelConfig) -> None:
    def write(folder: Path) -> list[str]:
        found = weights(model)
        entries = [Entry(f"model.{weight.ours}", weight.shape(model), torch.float32) for weight in found]
        with SafetensorsStream(folder / _FILE, entries) as stream:
            for weight, entry in zip(found, entries, strict=True):
                tensor = to_ours(weight, files.read(weight), model)
                if missing := entry.shape[0] - len(tensor):  # the vocabulary's padding
                    tensor = F.pad(tensor, (0, 0, 0, missing))
                stream.write(entry.name, tensor)
        fsync_file(folder / _FILE)
        return [_FILE]

    CheckpointStore(root, keep=None).save_files(0, write, {"source": "convert from-hf"})


def _copy_tokenizer(options: FromHF, folder: Path) -> DataConfig:
    """Copy tokenizer.json and tokenizer_config.json, where they are; the run's configuration says so, and names the
    tokens that end and start documents."""
    source = options.input / "tokenizer.json"
    if not source.is_file():
        return DataConfig()
    tokenizer = load_tokenizer(str(source), options.eod_token)  # refuses what is no tokenizer
    (folder / _TOKENIZER).mkdir()
    shutil.copyfile(source, folder / _TOKENIZER / "tokenizer.json")
    if (options.input / "tokenizer_config.json").is_file():
        beside = read_json_object(options.input / "tokenizer_config.json")
        write_atomic(folder / _TOKENIZER / "tokenizer_config.json", json.dumps(beside, indent=2, ensure_ascii=False))
    return DataConfig(
        tokenizer_model=str((options.output / _TOKENIZER).absolute()),
        eod_token=tokenizer.token(tokenizer.eod),
        bos=tokenizer.bos(None) is not None,
    )

"""The weights in a Hugging Face folder, checked against its configuration before any of them is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lfr.huggingface.config import read_json_object
from megatron_lfr.huggingface.names import Weight, weights
from megatron_lfr.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F32", "BF16", "F16")
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # old exports have them


class WeightFiles:
    """The weights of a model of `config` in `folder`: every one is there, in its shape, and no other.

    ValueError names the file or the weight that is not what it should be.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._files: dict[str, Path] = {}
        headers: dict[str, tuple[str, list[int]]] = {}
        for path in _find_files(folder):
            for name, header in _read_header(path).items():
                if name in headers:
                    raise ValueError(f"{path}: the weight {name} is in {self._files[name].name} too")
                self._files[name], headers[name] = path, header
        _check_headers(folder, headers, config)
        is_tied_copy = not config.untie_embeddings_and_output_weights and "lm_head.weight" in headers
        if is_tied_copy and not torch.equal(self._read("lm_head.weight"), self._read("model.embed_tokens.weight")):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")

    def read(self, weight: Weight) -> list[Tensor]:
        """The tensors that one of our weights is made of, in fp32."""
        return [self._read(name).float() for name in weight.theirs]

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _find_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the one, or those that the index names."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / INDEX).is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
            raise ValueError(
                f"--input {folder}: holds PyTorch pickles alone, which can execute code when they are read. Convert it "
                "where you trust it: transformers' from_pretrained, then save_pretrained, writes safetensors"
            )
        raise ValueError(f"--input {folder}: neither {_SINGLE} nor {INDEX} is there")
    names = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX}: no weight_map")
    return [folder / _checked_name(folder, name) for name in dict.fromkeys(map(_text, names.values()))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _checked_name(folder: Path, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", name):
        raise ValueError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file in this folder")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: {INDEX} names it, but it is not there")
    return name


def _read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """(type, shape) of each tensor in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _check_headers(folder: Path, headers: dict[str, tuple[str, list[int]]], config: ModelConfig) -> None:
    if config.num_layers > len(headers):  # before as many names are made
        raise ValueError(f"{folder}: num_hidden_layers is {config.num_layers}, but it holds {len(headers)} weights")
    shapes = {
        name: list(shape)
        for weight in weights(config)
        for name, shape in zip(weight.theirs, weight.shapes, strict=True)
    }
    if not config.untie_embeddings_and_output_weights and "lm_head.weight" in headers:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for name, shape in shapes.items():
        if name not in headers:
            raise ValueError(f"{folder}: the weight {name} is missing")
        if headers[name][1] != shape:
            raise ValueError(f"{folder}: {name} is {headers[name][1]}; after config.json it should be {shape}")
    for name, (dtype, _) in headers.items():
        if name not in shapes and not _DERIVED.fullmatch(name):
            raise ValueError(f"{folder}: holds the weight {name}, which a Llama of its config.json does not have")
        if dtype not in _DTYPES:
            raise ValueError(f"{folder}: {name} is {dtype}; only {', '.join(_DTYPES)} can be read")

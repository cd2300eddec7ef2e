"""The weights in a Hugging Face folder, checked against its configuration before any of them is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lfr.huggingface.json_values import read_json_object
from megatron_lfr.huggingface.names import Weight, check_finite, embedding_name, weights
from megatron_lfr.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F32", "BF16", "F16")
_OUTPUT = "lm_head.weight"
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
)
"""What old exports hold beside weights: frequencies, masks."""


class WeightFiles:
    """The weights of a model of `config` in `folder`, checked to be complete, of the right shapes, and without others.

    A tied embedding may be stored under the output's name only, and names may lack their first part, as those of a
    model without a head do. Raises ValueError that names the file or weight that is wrong.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._files: dict[str, Path] = {}
        headers: dict[str, tuple[str, list[int]]] = {}
        index = _read_index(folder)
        for path in [folder / _SINGLE] if index is None else dict.fromkeys(folder / name for name in index.values()):
            for name, header in read_header(path).items():
                if name in headers:
                    raise ValueError(f"{path}: the weight {name} is in {self._files[name].name} too")
                self._files[name], headers[name] = path, header
        if index is not None:
            self._check_index(folder, index)
        is_tied, embedding = not config.untie_embeddings_and_output_weights, embedding_name(config)
        prefix = embedding.partition(".")[0] + "."
        is_bare = not any(name.startswith(prefix) for name in headers)
        self._renamed = {prefix + name: name for name in headers if name != _OUTPUT} if is_bare else {}
        if is_tied and _OUTPUT in headers and embedding not in {*headers, *self._renamed}:
            self._renamed[embedding] = _OUTPUT
        for name, stored in self._renamed.items():
            headers[name] = headers.pop(stored)
        _check_headers(folder, headers, config, embedding)
        if is_tied and _OUTPUT in headers and not torch.equal(self._read(_OUTPUT), self._read(embedding)):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but {_OUTPUT} is not the embedding")

    def read(self, weight: Weight) -> list[Tensor]:
        """Read the tensors that one of our weights consists of, in fp32; ValueError for one that is not finite."""
        tensors = [self._read(name).float() for name in weight.theirs]
        for name, tensor in zip(weight.theirs, tensors, strict=True):
            check_finite(str(self._files[self._renamed.get(name, name)]), name, tensor)
        return tensors

    def _read(self, name: str) -> Tensor:
        stored = self._renamed.get(name, name)
        with safe_open(self._files[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def _check_index(self, folder: Path, index: dict[str, str]) -> None:
        """Check that the index and the files that it names hold the same weights."""
        for name, file in index.items():
            if self._files.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX}: {name} should be in {file}, which does not hold it")
        for name, path in self._files.items():
            if name not in index:
                raise ValueError(f"{path}: holds the weight {name}, which {INDEX} does not name")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return the file of each weight; None where all are in one file, which transformers, too, prefers to an index."""
    if (folder / _SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
            raise ValueError(
                f"--input {folder}: holds PyTorch pickles alone, which can execute code when they are read. Convert it "
                "where you trust it: transformers' from_pretrained, then save_pretrained, writes safetensors"
            )
        raise ValueError(f"--input {folder}: neither {_SINGLE} nor {INDEX} is there")
    files = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / INDEX}: no weight_map")
    return {name: _checked_name(folder, _text(file)) for name, file in files.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _checked_name(folder: Path, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", name):
        raise ValueError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file in this folder")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: {INDEX} names it, but it is not there")
    return name


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Read (type, shape) of each tensor in a safetensors file; ValueError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _check_headers(
    folder: Path, headers: dict[str, tuple[str, list[int]]], config: ModelConfig, embedding: str
) -> None:
    if config.num_layers > len(headers):  # checked before that many names are made
        raise ValueError(f"{folder}: num_hidden_layers is {config.num_layers}, but it holds {len(headers)} weights")
    shapes = {
        name: list(shape)
        for weight in weights(config)
        for name, shape in zip(weight.theirs, weight.shapes, strict=True)
    }
    if not config.untie_embeddings_and_output_weights and _OUTPUT in headers:
        shapes[_OUTPUT] = shapes[embedding]
    for name, shape in shapes.items():
        if name not in headers:
            raise ValueError(f"{folder}: the weight {name} is missing")
        if headers[name][1] != shape:
            raise ValueError(f"{folder}: {name} is {headers[name][1]}; after config.json it should be {shape}")
    for name, (dtype, _) in headers.items():
        if _DERIVED.fullmatch(name) and name not in shapes:
            continue
        if name not in shapes:
            raise ValueError(f"{folder}: holds the weight {name}, which a model of its config.json does not have")
        if dtype not in _DTYPES:
            raise ValueError(f"{folder}: {name} is {dtype}; only {', '.join(_DTYPES)} can be read")

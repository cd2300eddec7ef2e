"""Run folders and Hugging Face folders of small models with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, processors
from torch import Tensor, nn

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.config import RunConfig
from megatron_lfr.data.config import DataConfig
from megatron_lfr.model import Decoder, ModelConfig

BASE = ModelConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=96,
    vocab_size=101,
    make_vocab_size_divisible_by=64,
    max_position_embeddings=160,
    init_method_std=0.1,
)
MODELS = {
    "tied, one key a query": BASE,
    "untied, grouped queries": dataclasses.replace(
        BASE, num_query_groups=2, untie_embeddings_and_output_weights=True, norm_epsilon=1e-3
    ),
    "one key for all, a head size of its own, stretched positions": dataclasses.replace(
        BASE,
        num_query_groups=1,
        kv_channels=24,
        use_rope_scaling=True,
        rope_original_max_position_embeddings=64,
        rotary_base=500000.0,
    ),
}


def random_model(config: ModelConfig) -> Decoder:
    model = Decoder(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def make_run(folder: Path, config: ModelConfig, tokenizer: Path | None = None) -> Decoder:
    """Write a run folder with checkpoints of iterations 5 (zeros) and 7; return the model of 7."""
    model = random_model(config)
    store = CheckpointStore(folder / "checkpoints", keep=None)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    store.save(5, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, {})
    store.save(7, {**tensors, "optimizer.embedding.weight.step": torch.ones(())}, {})
    data = DataConfig(tokenizer_model=None if tokenizer is None else str(tokenizer))
    (folder / "config.yaml").write_text(RunConfig(model=config, data=data).to_yaml())
    return model


def make_tokenizer(path: Path, size: int, start: int | None = None) -> Path:
    """Write a tokenizer of words w0, w1, ..., the last of which ends a document; it starts a text with word `start`."""
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.add_special_tokens(["</s>"])
    if start is not None:
        word = f"w{start}"
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{word} $A", special_tokens=[(word, start)])
    tokenizer.save(str(path))
    return path


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a folder's safetensors files, read by the library."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file, which need not be there; None removes one."""
    value = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))

"""A study of a tiny model, as STUDY.yaml holds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml


def tiny_study(corpus: list[str]) -> dict[str, Any]:
    """Return a study of two arms over a corpus of two domains. Its held-out text is a copy of it."""
    return {
        "corpora": {"toy": {"data_path": list(corpus)}},
        "held_out": [copied(prefix) for prefix in corpus],
        "train": {
            "split": "100,0,0",
            "seq_length": 16,
            "max_position_embeddings": 16,
            "vocab_size": 64,
            "make_vocab_size_divisible_by": 1,
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "log_interval": 1,
        },
        "sizes": {"S": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32}},
        "rates": {"cosine": {"lr": 0.01, "lr_decay_style": "cosine"}},
        "seeds": [1, 2],
        "compute": 8000,
        "arms": {"uniform": {"settings": {"lfr_schedule": "uniform"}}, "lfr": {"settings": {"lfr_schedule": "lfr"}}},
    }


def copied(prefix: str) -> str:
    """Return the prefix of a copy of an indexed dataset, in a folder beside it."""
    folder = Path(prefix).with_name("held_out")
    folder.mkdir(exist_ok=True)
    for end in (".bin", ".idx"):
        shutil.copy(f"{prefix}{end}", folder)
    return str(folder / Path(prefix).name)


def write_study(path: Path, content: Any) -> Path:
    """Write a study and return its path."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path

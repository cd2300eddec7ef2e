"""The flags that `megatron-lfr estimate` has beside those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.build import make_corpus
from megatron_lfr.config import RunConfig, take_option
from megatron_lfr.data.corpus.blocks import parse_split
from megatron_lfr.lfr import Blend
from megatron_lfr.planning import make_blend


@dataclass(frozen=True)
class Options:
    """The flags that `estimate` has in addition to those of a run."""

    world_size: int | None
    blocks: int | None
    corpus_tokens: int | None
    tokens_per_second: float | None
    gpu_memory: float | None
    json: bool
    plan: bool = False
    gpu: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    calibrate: tuple[Path, ...] = ()


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Split the command line into our own flags and those of a run."""
    switches = {"json": "--json" in argv, "plan": "--plan" in argv}
    gpu, rest = take_option([word for word in argv if word not in ("--json", "--plan")], "--gpu")
    measured, rest = take_option(rest, "--calibrate")
    if measured is not None and not switches["plan"]:
        raise ValueError("--calibrate: goes with --plan")
    values: dict[str, Any] = {}
    for flag, kind in (
        ("--world-size", int),
        ("--blocks", int),
        ("--corpus-tokens", int),
        ("--tokens-per-second", float),
        ("--gpu-memory", float),
        ("--nodes", int),
        ("--gpus-per-node", int),
    ):
        text, rest = take_option(rest, flag)
        value = None
        if text is not None:
            try:
                value = kind(text)
            except ValueError:
                raise ValueError(f"{flag} {text}: expected a number") from None
            if not 0 < value < float("inf"):
                raise ValueError(f"{flag} {text}: must be positive and finite")
        values[flag[2:].replace("-", "_")] = value
    if values["blocks"] and values["corpus_tokens"]:
        raise ValueError("give one of --blocks and --corpus-tokens")
    for flag in ("gpu", "nodes", "gpus_per_node"):
        given = gpu if flag == "gpu" else values[flag]
        if (given is not None) != switches["plan"]:
            name = "--" + flag.replace("_", "-")
            raise ValueError(f"{name}: goes with --plan" if given is not None else f"--plan: needs {name}")
    calibrate = tuple(Path(name) for name in (measured or "").split(",") if name)
    return Options(**values, **switches, gpu=gpu, calibrate=calibrate), rest


def with_defaults(config: RunConfig, options: Options) -> RunConfig:
    """Fill in the settings that only a real run needs: a run folder, kernels, a corpus."""
    training = dataclasses.replace(config.training, layer_kernels="torch", attention_backend="auto")
    optimizer = dataclasses.replace(config.optimizer, adam_kernel="torch")
    checkpoint = dataclasses.replace(config.checkpoint, save="-", load=None, finetune=False)
    data = config.data
    if options.blocks or options.corpus_tokens:
        data = dataclasses.replace(data, data_path=["-"], data_args_path=None)
    elif not (data.data_path or data.data_args_path):
        raise ValueError("give the corpus with --data-path, or its size with --blocks or --corpus-tokens")
    return dataclasses.replace(config, training=training, optimizer=optimizer, checkpoint=checkpoint, data=data)


def corpus_blocks(config: RunConfig, options: Options) -> tuple[int, Blend | None]:
    """Return the number of training blocks, and how the prefixes of the corpus share the samples, if they are known."""
    data = config.data
    if options.blocks:
        return options.blocks, None
    if options.corpus_tokens:
        blocks = int(options.corpus_tokens * parse_split(data.split)[0]) // data.seq_length
        if not blocks:
            raise ValueError(f"--corpus-tokens {options.corpus_tokens}: no block of {data.seq_length} tokens")
        return blocks, None
    corpus = make_corpus(data)
    return corpus.train.num_blocks, make_blend(config, corpus)


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

"""`megatron-lfr study --pilot`: what choosing data is worth on a corpus of the user's, from a sample of it and a small
model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_lfr.commonness.clean import cleaned_prefixes
from megatron_lfr.commonness.command import CommonnessConfig, check_disjoint
from megatron_lfr.data.config import parse_blend
from megatron_lfr.data.corpus.blocks import open_prefixes
from megatron_lfr.fileio import check_can_be_folder, write_atomic
from megatron_lfr.lfr import preset
from megatron_lfr.study.sample import ALL, Sample, make_sample

DEFINITION = "pilot.yaml"
BATCH = 16
"""Blocks of a step."""
MODEL = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 176, "init_method_std": 0.06}
"""The proxy: 0.28M weights of matrix products beside the output layer."""
RATE = {"lr": 8e-3, "min_lr": 0, "lr_decay_style": "cosine"}
TRAINING_SHARE = 0.7
"""Of the time; the rest is for sampling, commonness, evaluations and starts of processes."""
LEAST_STEPS = 20
"""Fewest steps of a run that says something."""
POINTS = (1, 1.5)
"""Lengths of uniform, for token equivalents."""
FOCUS = [
    {"kind": "learn", "duration": 0.4, "unit": "share"},
    {"kind": "focus", "duration": 0.24, "unit": "share", "drop": 0.3, "drop_hardest": 0.15, "score": "detrended"},
    {"kind": "review", "duration": 0.1, "unit": "share", "passes": "continued"},
    {"kind": "focus", "duration": 0.1, "unit": "share", "drop": 0.3, "drop_hardest": 0.15, "score": "detrended"},
    {"kind": "review", "duration": 0.16, "unit": "share", "passes": "continued"},
]
"""Both tails of the loss left out, twice."""
ADVICE = {
    "cleaned": "clean the corpus with `megatron-lfr commonness --cleaned-output`, and train on that with"
    " --lfr-schedule uniform",
    "weight": "give `train` the weights of `megatron-lfr commonness`: --lfr-schedule uniform --lfr-scores"
    " weight=FOLDER/block_weight.npy",
    "cleaned-focus": "clean the corpus with `megatron-lfr commonness --cleaned-output`, and train with the schedule of"
    " the arm cleaned-focus in " + DEFINITION,
    "lfr": "train with --lfr-schedule lfr",
}


@dataclass(frozen=True)
class PilotConfig:
    """Ask what choosing data is worth on your corpus: small models, on a sample of it, of each way and several seeds.

    Copies are kept together in the sample. Writes OUTPUT/pilot.yaml, which is a study as any other, runs it, and says
    which flags to use, or that nothing pays. The same command goes on where it was stopped.
    """

    data_path: list[str]
    """Prefixes of the preprocessed corpus."""
    output: Path
    """Folder for the sample, the runs and the page."""
    tokenizer_model: str | None = None
    """The tokenizer of the corpus."""
    vocab_size: int | None = None
    """Number of tokens, where the corpus has no tokenizer."""
    reference_data_path: list[str] = field(default_factory=list)
    """Prefixes of trusted text, made with the same tokenizer and disjoint from the corpus. Some of it is held out and
    decides; the rest tells junk from text. Without it, documents of the corpus are held out, of copies one each."""
    minutes: float = 60
    """Time that it may take, about."""
    epochs: float = 1.0
    """How often the run that this is for will see its corpus."""
    seq_length: int = 128
    """Tokens in a block."""
    seeds: int = 6
    """Runs of each way, at least 2. Few leave it open whether a small difference is one."""
    jobs: int = 2
    """Runs side by side, one thread each."""
    memory_gb: float = 4.0
    """Memory for finding the copies of the corpus, in GB (10^9 bytes)."""

    def validate(self) -> None:
        """Check what can be checked before anything is read; errors name the flag and the legal values."""
        if (self.tokenizer_model is None) == (self.vocab_size is None):
            raise ValueError("give one of --tokenizer-model and --vocab-size")
        for flag, value, least in (
            *(("--minutes", self.minutes, 0.1), ("--epochs", self.epochs, 0.1), ("--seq-length", self.seq_length, 8)),
            *(("--seeds", self.seeds, 2), ("--jobs", self.jobs, 1)),
        ):
            if not least <= value < 1e6:
                raise ValueError(f"{flag} {value}: must be at least {least}")
        for flag, given in (("--data-path", self.data_path), ("--reference-data-path", self.reference_data_path)):
            prefixes, weights = parse_blend(given, flag) if given else ([], None)
            if weights is not None:
                raise ValueError(f"{flag}: a pilot takes prefixes without weights")
            cleaned_prefixes(prefixes, self.output, flag)
        check_disjoint(self.reference_data_path, self.data_path, "--reference-data-path")
        open_prefixes(self.data_path)
        open_prefixes(self.reference_data_path, "--reference-data-path")
        check_can_be_folder("--output", self.output)


def prepare(config: PilotConfig) -> Path:
    """Write the sample and the study of it into the output's folder, unless they are there, and return the study.

    ValueError where the folder holds the pilot of another command.
    """
    config.validate()
    asked = "# " + json.dumps(dataclasses.asdict(config), default=str)
    file = config.output / DEFINITION
    if file.exists():
        if file.read_text(encoding="utf-8").partition("\n")[0] != asked:
            raise ValueError(f"--output {config.output}: holds the pilot of another command; name a new folder")
        return file
    compute = _tokens_of_a_run(config)
    _check_steps(config, compute, f"--minutes {config.minutes:g}")
    look = CommonnessConfig(
        config.data_path,
        config.output / "commonness",
        seq_length=config.seq_length,
        split=ALL,
        memory_gb=config.memory_gb,
        threads=config.jobs,
    )
    sample = make_sample(look, config.reference_data_path, int(compute / config.epochs), config.output)
    compute = min(compute, sample.tokens * config.epochs)
    _check_steps(config, compute, f"--epochs {config.epochs:g} of a sample of {sample.tokens:,} tokens")
    study = definition(config, sample, compute)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{asked}\n{yaml.safe_dump(study, sort_keys=False)}")
    return file


def _check_steps(config: PilotConfig, compute: float, given: str) -> None:
    """Check that a run is long enough to say something; ValueError begins with what was given."""
    steps = int(compute) // (BATCH * config.seq_length)
    if steps < LEAST_STEPS:
        raise ValueError(f"{given} is enough for {steps} steps a run; at least {LEAST_STEPS} are needed")


def _tokens_of_a_run(config: PilotConfig) -> float:
    """Return how many tokens a run may train on, by the measured speed of the proxy."""
    runs = config.seeds * (len(_arms(config)) - 1 + sum(POINTS))
    seconds = TRAINING_SHARE * 60 * config.minutes * config.jobs / runs
    return seconds * _tokens_per_second(config)


def _tokens_per_second(config: PilotConfig) -> float:
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**MODEL, **_training(config)}.items()
        if name not in ("split", "log_interval")
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "speed.json")
        steps = ["--steps", "8", "--warmup", "2", "--traced-steps", "1", "--json", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "megatron_lfr", "benchmark", *flags, *steps]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ValueError(f"the proxy does not train: {ended.stderr.strip()}")
        return float(json.loads(result.read_bytes())["tokens_per_second"])


def _training(config: PilotConfig) -> dict[str, Any]:
    vocabulary: dict[str, Any] = {"vocab_size": config.vocab_size, "make_vocab_size_divisible_by": 1}
    if config.tokenizer_model is not None:
        vocabulary = {"tokenizer_model": config.tokenizer_model}
    return {
        **vocabulary,
        "split": "100,0,0",
        "seq_length": config.seq_length,
        "max_position_embeddings": config.seq_length,
        "micro_batch_size": BATCH,
        "global_batch_size": BATCH,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "log_interval": 20,
    }


def _arms(config: PilotConfig, trusted: Sequence[str] = ()) -> dict[str, Any]:
    common = {"reference_data_path": list(trusted)} if config.reference_data_path else {}
    look = {"commonness": {**common, "threads": 1, "memory_gb": config.memory_gb}}
    cleaned = {"common": look, "corpus": {"clean": "common"}}
    lfr = {"lfr": {"settings": {"lfr_schedule": "lfr"}}} if _has_focus(config.epochs) else {}
    return {
        "uniform": {"settings": {"lfr_schedule": "uniform"}},
        "cleaned": {"prepare": cleaned, "settings": {"lfr_schedule": "uniform"}},
        "weight": {
            "prepare": {"common": look},
            "settings": {"lfr_schedule": "uniform", "lfr_scores": ["weight={common}/block_weight.npy"]},
        },
        "cleaned-focus": {"prepare": cleaned, "settings": {"lfr_schedule": FOCUS}},
        **lfr,
    }


def _has_focus(epochs: float) -> bool:
    """Whether `lfr` has a Focus in so many epochs: not in the first pass, in which it is `uniform`."""
    phases = preset("lfr").phases
    last = max(number for number, phase in enumerate(phases) if phase.kind == "focus")
    return epochs * sum(phase.duration for phase in phases[:last]) >= 1


def definition(config: PilotConfig, sample: Sample, compute: float) -> dict[str, Any]:
    """Return the study of a sample as STUDY.yaml holds it."""
    steps = int(compute) // (BATCH * config.seq_length)
    return {
        "title": f"What choosing data is worth: {sample.tokens:,} tokens of {_names(config.data_path)}",
        "corpora": {"sample": {"data_path": sample.data_path}},
        "held_out": sample.held_out,
        "train": {**_training(config), "lr_warmup_iters": max(1, min(50, steps // 10))},
        "sizes": {"proxy": MODEL},
        "rates": {"cosine": RATE},
        "seeds": list(range(config.seeds)),
        "compute": int(compute),
        "compute_points": list(POINTS),
        "smallest_difference": 0.02,
        "arms": _arms(config, sample.trusted),
    }


def _names(data_path: Sequence[str]) -> str:
    """Return the prefixes as a title has them: at most two by name."""
    if len(data_path) <= 2:
        return " and ".join(data_path)
    return f"{data_path[0]} and {len(data_path) - 1} more"


def advice(summary: dict[str, Any]) -> str:
    """Return the sentence at the end: what to do, and what it should be worth."""
    cell = summary["cells"][0]
    kind = cell["verdict"]["kind"]
    if kind == "nothing pays":
        return "uniform: nothing pays here"
    if kind != "pays":
        largest = -min(row["by_seeds"]["low"] for row in cell["contrasts"])
        return (
            f"uniform, as nothing is shown to pay; the intervals leave room for a gain of {largest:.3f} nats, on which "
            "more --minutes and --seeds would decide"
        )
    best = cell["verdict"]["arm"]
    row = next(row for row in cell["arms"] if row["arm"] == best)
    worth = row["token_equivalent"]
    if worth is None or worth["low"] is None:
        gain = -next(contrast["by_seeds"]["mean"] for contrast in cell["contrasts"] if contrast["arm"] == best)
        return (
            f"{ADVICE[best]}; at this size, its loss was {gain:.3f} nats below that of uniform, whose own loss does "
            "not fall enough with compute to say what a token was worth"
        )
    beyond = " (in part beyond the longest of its runs)" * row["token_equivalent_beyond"]
    return (
        f"{ADVICE[best]}; at this size, a token so chosen was worth {worth['mean']:.2f} of uniform's{beyond}, "
        f"95 % {worth['low']:.2f} to {worth['high']:.2f}"
    )

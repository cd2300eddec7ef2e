"""`megatron-lfr estimate` as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.model import MODEL_PRESETS

RUN = [
    *("--model-preset", "120M", "--vocab-size", "32000", "--seq-length", "1024", "--bf16", "--lr", "1e-4"),
    *("--micro-batch-size", "4", "--global-batch-size", "32"),
]
SCHEDULE = "[{kind: learn, duration: 1}, {kind: focus, duration: 50, unit: steps, drop: 0.5}]"


def estimate(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], str]:
    length = [] if "--lfr-schedule" in flags else ["--train-epochs", "2.5"]
    assert main(["estimate", *RUN, *length, *flags, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_phases_tokens_flops_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lfr-schedule", SCHEDULE, "--blocks", "10000", "--tokens-per-second", "1e5")
    result, _ = estimate(capsys, *flags)
    learn, focus = result["phases"]
    assert (learn["steps"], learn["tokens"], learn["epochs"]) == (313, 10_240_000, 1.0)
    assert (focus["steps"], focus["blocks"], focus["epochs"]) == (50, 1600, 0.16)
    assert result["total"]["steps"] == 363
    assert result["total"]["seconds"] == pytest.approx(11_600 * 1024 / 1e5)
    # Twice a multiplication and an addition in the backward for each in the forward, for every weight of a product ...
    products = 12 * (4 * 768 * 768 + 3 * 768 * 2304) + 32000 * 768
    # ... and for each pair of a query and a key: a product with the key, one with the value.
    pairs = {"flops": 1024 * 1025 / 2, "flops_full_attention": 1024 * 1024}
    for key, number in pairs.items():
        attention = 12 * 12 * number * 2 * 64
        assert learn[key] == pytest.approx(10_000 * 6 * (1024 * products + attention))


def test_a_corpus_is_opened_or_given_in_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "corpus_text_document"
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(100):
            writer.add_document(np.zeros(1500, np.uint16))
    opened, _ = estimate(capsys, "--data-path", str(prefix), "--split", "90,10,0")
    assert opened["blocks"] == (90 * 1500 - 1) // 1024
    printed, _ = estimate(capsys, "--corpus-tokens", "150000", "--split", "90,10,0")
    assert printed == opened


def test_layouts_share_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*flags: str) -> list[dict[str, int]]:
        rows: list[dict[str, int]] = estimate(capsys, "--blocks", "10000", *flags)[0]["memory"]
        return rows

    (one,) = memory()
    weights = MODEL_PRESETS["120M"].num_layers * (4 * 768**2 + 3 * 768 * 2304 + 2 * 768) + 768 + 32000 * 768
    assert one["optimizer"] == 8 * weights
    assert one["gathered"] == 2 * weights
    (sharded,) = memory("--world-size", "8", "--data-parallel-sharding-strategy", "optim_grads_params")
    assert sharded["optimizer"] == one["optimizer"] // 8
    assert sharded["gathered"] < one["gathered"] / 2
    (split,) = memory("--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert split["activations"] == pytest.approx(one["activations"] / 2, rel=0.2)
    assert split["logits"] == pytest.approx(one["logits"] / 2, rel=0.05)
    first, last = memory("--pipeline-model-parallel-size", "2")
    assert first["logits"] == 0 < last["logits"]
    assert first["activations"] > 1.5 * last["activations"]
    (recomputed,) = memory("--recompute-granularity", "full")
    assert recomputed["activations"] < one["activations"] / 4


def test_of_a_run_of_adapters_they_alone_have_gradients_and_moments(capsys: pytest.CaptureFixture[str]) -> None:
    complete, _ = estimate(capsys, "--blocks", "10000")
    adapted, _ = estimate(capsys, "--blocks", "10000", "--lora-rank", "16")
    adapters = 12 * 16 * (4 * (768 + 768) + 3 * (768 + 2304))  # layers, rank; inputs and outputs of 7 modules
    assert (complete["adapters"], adapted["adapters"]) == (None, adapters)
    (one,), (all_weights,) = adapted["memory"], complete["memory"]
    tables = all_weights["weights"] - 4 * complete["parameters"]
    assert one["weights"] == 2 * complete["parameters"] + 4 * adapters + tables
    assert one["optimizer"] == 8 * adapters
    assert one["gradients"] < all_weights["gradients"] / 20
    assert one["peak"] < all_weights["peak"] - 10 * complete["parameters"]
    products = 12 * (4 * 768 * 768 + 3 * 768 * 2304) + 32000 * 768
    attention = complete["flops_per_token"]["causal"] - 6 * products
    assert adapted["flops_per_token"]["causal"] == pytest.approx(4 * products + 6 * adapters + attention)
    assert adapted["total"]["flops"] == 25000 * 1024 * adapted["flops_per_token"]["causal"]
    rite = estimate(capsys, "--blocks", "9", "--lora-rank", "16", "--optimizer", "lora-rite", "--clip-grad", "0")
    assert "--optimizer lora-rite is estimated as adam; every rank holds all of its state" in rite[1]
    assert main(["estimate", *RUN, "--blocks", "9", "--train-epochs", "1", "--lora-rank", "16"]) == 0
    assert f" and {adapters:,} of adapters, which alone are trained, " in capsys.readouterr().out
    plan = ["--plan", "--gpu", "h100", "--nodes", "1", "--gpus-per-node", "8", "--train-epochs", "1", "--blocks", "9"]
    assert main(["estimate", *RUN, *plan, "--lora-rank", "16"]) == 2
    assert "--plan: is about training all weights; leave out --lora-rank" in capsys.readouterr().err


def test_it_warns_where_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = estimate(capsys, "--blocks", "100")
    peak = result["memory"][0]["peak"] / 1e9
    assert estimate(capsys, "--blocks", "100", "--gpu-memory", f"{peak + 0.01:.3f}")[1] == ""
    _, printed = estimate(capsys, "--blocks", "100", "--gpu-memory", f"{peak - 0.01:.3f}")
    assert f"a rank needs {peak:.1f} GB, more than --gpu-memory" in printed
    _, printed = estimate(capsys, "--blocks", "100", "--layer-kernels", "liger")
    assert "--layer-kernels liger is estimated as torch" in printed


def test_it_says_that_rescoring_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = SCHEDULE.replace("drop: 0.5", "drop: 0.5, score: rescored")
    result, err = estimate(capsys, "--lfr-schedule", schedule, "--blocks", "10000")
    products = 12 * (4 * 768 * 768 + 3 * 768 * 2304) + 32000 * 768
    forward = 10_000 * 2 * (1024 * products + 12 * 12 * 1024 * 1025 / 2 * 2 * 64)
    assert f"before each of 1 phases with score: rescored, {forward:.3e} FLOP a pass" in err
    assert result["phases"] == estimate(capsys, "--lfr-schedule", SCHEDULE, "--blocks", "10000")[0]["phases"]


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *RUN, "--blocks", "10000", "--train-epochs", "2.5", "--tokens-per-second", "1e5"]) == 0
    out = capsys.readouterr().out
    for words in ("pipeline rank", "activations", "0 learn", "4 review", "0:04:16"):
        assert words in out
    assert "116,607,744 parameters" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the corpus with --data-path, or its size with --blocks or --corpus-tokens"),
        (["--blocks", "5", "--corpus-tokens", "7"], "give one of --blocks and --corpus-tokens"),
        (["--blocks", "many"], "--blocks many: expected a number"),
        (["--blocks", "0"], "--blocks 0: must be positive"),
        (["--corpus-tokens", "50"], "no block of 1024 tokens"),
        (["--blocks", "5", "--tokens-per-second", "nan"], "--tokens-per-second nan: must be positive"),
        (["--blocks", "5", "--gpu-memory"], "--gpu-memory: needs a value"),
        (["--blocks", "5", "--world-size", "3", "--tensor-model-parallel-size", "2"], "must be a multiple of 2"),
        (["--data-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *RUN, *flags]) == 2
    assert message in capsys.readouterr().err


def test_document_masks_by_backend(capsys: pytest.CaptureFixture[str]) -> None:
    """Dense, they are all queries times all keys of each sequence; without, next to nothing."""

    def activations(*flags: str) -> int:
        shown = estimate(capsys, "--blocks", "10000", "--tokenizer-model", "bytes", "--reset-attention-mask", *flags)[0]
        size: int = shown["memory"][0]["activations"]
        return size

    dense = activations("--attention-backend", "sdpa")
    assert activations("--distributed-backend", "gloo") == dense  # a CPU is meant
    without = activations()
    assert without == activations("--attention-backend", "flex")
    assert 0.99 < (dense - without) / (2 * 4 * 1024 * 1024) <= 1
    assert main(["estimate", *RUN, "--train-epochs", "1", "--blocks", "9", "--attention-backend", "flex"]) == 2
    assert "--attention-backend flex: goes with --reset-attention-mask" in capsys.readouterr().err


def test_deepspeed_is_estimated_by_stage_and_offloading(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("hjson", reason="the deepspeed extra is not installed")

    def memory(stage: int, **zero: Any) -> dict[str, int]:
        path = tmp_path / "ds.json"
        sizes = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 1000}
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, **sizes, **zero}}))
        flags = ["--blocks", "10000", "--world-size", "8", "--deepspeed", "--deepspeed-config", str(path)]
        (rank,) = estimate(capsys, *flags)[0]["memory"]
        return {name: int(size) for name, size in rank.items()}

    cpu = {"device": "cpu"}
    stages = [memory(stage) for stage in range(4)]
    assert [rank["peak"] for rank in stages] == sorted((rank["peak"] for rank in stages), reverse=True)
    assert all(rank["host"] == 0 for rank in stages)
    elements = stages[0]["optimizer"] / 8
    assert stages[1]["optimizer"] == pytest.approx(elements, rel=1e-6)  # 8 bytes by 8 ranks
    offloaded = memory(2, offload_optimizer=cpu)
    assert offloaded["optimizer"] == 0
    assert offloaded["peak"] < stages[2]["peak"]
    assert offloaded["host"] > 12 * elements / 8
    everything = memory(3, offload_optimizer=cpu, offload_param=cpu)
    assert everything["peak"] < memory(3, offload_optimizer=cpu)["peak"]

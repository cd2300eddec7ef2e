"""`estimate --plan`: which layouts it ranks, and what it says of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig, parse_run_config
from megatron_lfr.estimate.layouts import legal_layouts, read_device
from megatron_lfr.estimate.step_time import Hardware
from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.devices import DEVICES

MODEL = [
    *("--num-layers", "8", "--hidden-size", "512", "--num-attention-heads", "8", "--num-query-groups", "2"),
    *("--vocab-size", "32000", "--seq-length", "256", "--global-batch-size", "16", "--bf16"),
]
LARGE = [
    *(
        "--model-preset",
        "70B",
        "--vocab-size",
        "128256",
        "--seq-length",
        "8192",
        "--global-batch-size",
        "128",
        "--bf16",
    ),
    *("--train-epochs", "1", "--corpus-tokens", "1000000000000"),
]
PLAN = ["--plan", "--gpu", "h100", "--nodes", "8", "--gpus-per-node", "8"]


def key(config: RunConfig) -> tuple[object, ...]:
    parallel = config.parallel
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    return (*sizes, virtual, parallel.sharding, config.training.micro_batch_size, config.training.recompute_granularity)


def test_layouts_are_those_that_train_takes() -> None:
    """Against trying all combinations on the checks of the whole configuration."""
    config, _ = parse_run_config([*MODEL, "--data-path", "-", "--save", "-", "--train-epochs", "1"])
    world_size, taken = 8, set()
    shardings = ("no_shard", "optim", "optim_grads", "optim_grads_params")
    for tensor, pipeline, context in itertools.product((1, 2, 4, 8), repeat=3):
        if world_size % (tensor * pipeline * context):
            continue
        for virtual, sharding, rows in itertools.product((None, 1, 2, 4), shardings, (1, 2, 4, 8, 16)):
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                pipeline_model_parallel_size=pipeline,
                num_layers_per_virtual_pipeline_stage=virtual,
                context_parallel_size=context,
                data_parallel_sharding_strategy=sharding,  # type: ignore[arg-type]
            )
            training = dataclasses.replace(config.training, micro_batch_size=rows)
            one = dataclasses.replace(config, parallel=parallel, training=training)
            stages = pipeline * (virtual or 1)
            same_as_others = (virtual is not None and virtual * pipeline >= 8) or (
                tensor * pipeline == 8 and sharding != "no_shard"  # nobody to share with
            )
            if same_as_others or 8 % stages:
                continue
            try:
                one.validate(world_size)
            except ValueError:
                continue
            taken |= {(*key(one)[:-1], again) for again in (None, "selective", "full")}
    listed = [key(one) for one in legal_layouts(config, config.model, world_size, Hardware(DEVICES["h100"], 8))]
    assert len(listed) == len(set(listed))
    assert set(listed) == taken
    assert len(taken) > 100


def test_the_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *PLAN, *LARGE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    best = result["best"]
    assert len(best) == 10
    assert [one["step_seconds"] for one in best] == sorted(one["step_seconds"] for one in best)
    assert all(one["memory"] <= 0.9 * 80e9 for one in best)
    assert all(sum(one["parts"].values()) == pytest.approx(one["step_seconds"]) for one in best)
    usual = {row["usual"]: row["why"] for row in result["usual"]}
    assert "needs at least" in usual["data parallel, sharded optimizer (ZeRO-1)"]
    for one in best:  # ready flags: `train` takes them
        config, _ = parse_run_config([*LARGE[:-2], *one["flags"].split(), "--data-path", "-", "--save", "-"])
        config.validate(64)


def test_what_choosing_blocks_adds_at_scale(capsys: pytest.CaptureFixture[str]) -> None:
    """10^5 ranks and 10^10 blocks, whose ids no longer fit into 32 bits."""
    flags = ["--plan", "--gpu", "b200", "--nodes", "12500", "--gpus-per-node", "8", "--model-preset", "70B"]
    sizes = ["--vocab-size", "128256", "--seq-length", "2048", "--global-batch-size", "100000", "--bf16"]
    assert main(["estimate", *flags, *sizes, "--train-epochs", "1", "--blocks", "10000000000", "--json"]) == 0
    lfr = json.loads(capsys.readouterr().out)["lfr"]
    assert lfr["journal_bytes"] == pytest.approx(4e10, rel=1e-3)
    assert lfr["ledger_bytes"] == 10 * 10**10
    assert lfr["order_bytes"] == pytest.approx(8 * 0.4e10, rel=1e-3)  # the Learn of `lfr`
    assert 0 < lfr["losses_all_reduce_seconds"] < 1e-3
    assert 0 < lfr["order_share"] < 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--gpu", "h100", "--nodes", "1"], "--plan: needs --gpus-per-node"),
        (["--gpu", "h100"], "--gpu: goes with --plan"),
        ([*PLAN[:2], "x100", *PLAN[3:]], "--gpu x100: choose from a100, h100, h200, b200, or name a JSON file"),
        ([*PLAN, "--no-bf16"], "--plan: is about bf16"),
    ],
)
def test_what_is_wrong_is_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *LARGE, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    rates = {name: value for name, value in vars(DEVICES["a100"]).items() if name != "fp32_tflops"}
    path.write_text(json.dumps(rates))
    assert read_device(str(path)) == dataclasses.replace(DEVICES["a100"], fp32_tflops=None)
    for bad in ("[1]", "{", json.dumps({**rates, "memory_gb": -1}), json.dumps({**rates, "cores": 3})):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"^--gpu "):
            read_device(str(path))

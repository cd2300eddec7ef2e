"""The examples run as a user runs them, and do what they say."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import Curriculum, Journal, Plan, preset
from megatron_lfr.parallel import shutdown
from support.ports import free_port
from support.waiting import LIMIT

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
KINDS = ["learn", "focus", "review", "focus", "review"]


def load(name: str) -> ModuleType:
    """Import an example as a module, as it finds its neighbours when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[name] = example  # where dataclasses look for their types
    spec.loader.exec_module(example)
    return example


def run(*command: str, processes: int) -> str:
    """Return the output of `python *command` from the first of `processes` that are started as torchrun does."""
    port = free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    shared = {"PYTHONPATH": path, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in map(str, range(processes)):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes))
    try:
        ended = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return ended[0][0]


def plan_of(folder: Path, global_batch_size: int, epochs: float) -> tuple[BlockDataset, Plan]:
    corpus = BlockDataset([folder / "toy_text_document"], 64, "90,10,0")
    return corpus, preset("lfr").plan(corpus.train.num_blocks, 64, global_batch_size, train_epochs=epochs)


def journaled(folder: Path, phases: int = 5) -> list[np.ndarray]:
    return [np.load(folder / f"phase_{phase:03d}.npy") for phase in range(phases)]


def ids_of_a_plain_loop(losses: list[np.ndarray], plan: Plan, folder: Path) -> list[list[int]]:
    """Return what a plain loop is served, step by step, that meets these losses."""
    curriculum = Curriculum(plan, Journal(folder, {}), seed=1)
    served = []
    for step, ids in curriculum.steps():
        phase = plan.at_step(step)
        first = (step - phase.first_step) * plan.global_batch_size
        nll = losses[phase.index][first : first + plan.global_batch_size]
        curriculum.record(step, nll * 64.0, np.full(len(nll), 64.0))
        served.append(ids.tolist())
    return served


def fp64_nll(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Mean NLL of each row of labels [B, S]."""
    return [
        -row.double().log_softmax(1)[range(len(to)), to].mean().item() for row, to in zip(logits, labels, strict=True)
    ]


def assert_focus_meets_noise(losses: list[np.ndarray]) -> None:
    """Half of the toy corpus can be learnt and half cannot: without a choice, every phase would meet both."""
    for phase, nll in enumerate(losses):
        assert (nll >= 0).all()
        easy = (nll < 3.9).mean()
        assert easy < 0.05 if phase in (1, 3) else easy > 0.3


def test_the_plain_pytorch_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("plain_pytorch_loop")
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d is followed by %d. " % (i, i + 1) for i in range(900)))
    n_blocks = (text.stat().st_size - 1) // example.SEQ_LENGTH
    visits = example.main(str(text))
    assert visits.total() == 4 * n_blocks  # four epochs' worth
    assert set(visits) == set(range(n_blocks))
    assert max(visits.values()) > min(visits.values())  # Focus chose
    ends = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in ends] == KINDS
    assert float(ends[-1].split()[-1]) < 0.7 * float(ends[0].split()[-1])


@dataclass
class Seen:
    """What a Trainer's model was given, and its losses, in the order of training."""

    rows: list[list[int]] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_at_first: list[float] = field(default_factory=list)
    """Of the first step's blocks under the first weights in fp64."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """Run the example in this process, with an eye on the model."""
    from transformers import LlamaForCausalLM

    folder, seen = tmp_path_factory.mktemp("trainer"), Seen()
    original = LlamaForCausalLM.forward

    @functools.wraps(original)  # Trainer looks at its parameters
    def forward(model: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        outputs = original(model, input_ids, **more)
        if model.training:
            if len(seen.rows) < 8:
                exact = original(copy.deepcopy(model).double(), input_ids).logits
                seen.nll_at_first += fp64_nll(exact.detach()[:, :-1], input_ids[:, 1:])
            seen.rows += input_ids.tolist()
            seen.nll += fp64_nll(outputs.logits.detach()[:, :-1], input_ids[:, 1:])
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", forward)
        load("transformers_trainer").main(["--output-dir", str(folder)])
    return folder, seen


def test_a_transformers_trainer_serves_the_curriculums_blocks(trained: tuple[Path, Seen], tmp_path: Path) -> None:
    folder, seen = trained
    corpus, plan = plan_of(folder, 8, 3.0)
    assert plan.total_samples % 8  # some step is padded
    steps = ids_of_a_plain_loop(journaled(folder / "journal"), plan, tmp_path)
    ids = [block_id for step in steps for block_id in step]
    assert seen.rows == corpus.train.read(ids).tolist()
    assert set(load("transformers_trainer").example(np.zeros(65, int), -1)["labels"]) == {-100}  # padding has no loss


def test_a_transformers_trainer_records_the_losses_of_its_blocks(trained: tuple[Path, Seen]) -> None:
    folder, seen = trained
    _, plan = plan_of(folder, 8, 3.0)
    losses = journaled(folder / "journal")
    assert losses[0][:8].tolist() == pytest.approx(seen.nll_at_first, abs=1e-5)
    real = [8 * phase.first_step + sample for phase in plan.phases for sample in range(phase.samples)]
    assert np.concatenate(losses).tolist() == pytest.approx([seen.nll[row] for row in real], abs=1e-5)
    assert_focus_meets_noise(losses)


def test_a_transformers_trainer_goes_on_from_a_checkpoint(
    trained: tuple[Path, Seen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the middle of a Focus, to the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    _, plan = plan_of(folder, 8, 3.0)
    assert plan.at_step(40).phase.kind == "focus"
    assert plan.at_step(40).first_step < 40
    for later in ("checkpoint-60", "checkpoint-80", f"checkpoint-{plan.total_steps}"):
        shutil.rmtree(folder / later)
    load("transformers_trainer").main(["--output-dir", str(folder), "--resume"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "left out" in line] == KINDS[1:]
    for file in (*(f"journal/phase_{i:03d}.npy" for i in range(5)), f"checkpoint-{plan.total_steps}/model.safetensors"):
        assert (folder / file).read_bytes() == (trained[0] / file).read_bytes()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"dataloader_num_workers": 1}, "dataloader_num_workers must be 0"),
     ({"ignore_data_skip": False}, "ignore_data_skip must be True"),
     ({"per_device_train_batch_size": 2}, "Trainer takes 4 blocks a step, the plan 8")],
)  # fmt: skip
def test_settings_of_a_trainer_that_would_serve_other_blocks(
    setting: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("transformers_trainer")
    arguments = example.TrainingArguments
    monkeypatch.setattr(example, "TrainingArguments", lambda **given: arguments(**{**given, **setting}))
    with pytest.raises(ValueError, match=message):
        example.main(["--output-dir", str(tmp_path)])


@pytest.mark.slow
def test_two_processes_of_a_transformers_trainer(tmp_path: Path) -> None:
    """Each loss of the first step, under the first weights, comes back to the block that it is of."""
    example = load("transformers_trainer")
    out = run("examples/transformers_trainer.py", "--output-dir", str(tmp_path), "--epochs", "1", processes=2)
    assert [line.split()[0] for line in out.splitlines() if "left out" in line] == KINDS
    corpus, plan = plan_of(tmp_path, 16, 1.0)
    losses = journaled(tmp_path / "journal")
    assert [len(nll) for nll in losses] == [phase.samples for phase in plan.phases]
    ids = ids_of_a_plain_loop(losses, plan, tmp_path / "plain")[0]
    rows = torch.from_numpy(corpus.train.read(ids))
    torch.manual_seed(0)
    with torch.no_grad():
        logits = example.make_model()(rows[:, :-1]).logits
    assert losses[0][:16].tolist() == pytest.approx(fp64_nll(logits, rows[:, 1:]), abs=1e-5)


def test_the_samples_are_those_of_gpt_dataset(tmp_path: Path) -> None:
    """Against slices of the .bin as one array."""
    example = load("megatron_gpt_dataset")
    prefix = example.write_toy_corpus(tmp_path)
    flat = np.fromfile(prefix.with_suffix(".bin"), np.uint16).astype(np.int64)
    dataset = example.LFRDataset(BlockDataset([prefix], 24, "100,0,0").train)
    assert len(dataset) == (len(flat) - 1) // 24
    for i in (0, 1, 2, 300, len(dataset) - 1):
        sample = dataset[i]
        text = flat[24 * i : 24 * (i + 1) + 1]
        assert sample["tokens"].tolist() == text[:-1].tolist()
        assert sample["labels"].tolist() == text[1:].tolist()
        assert sample["loss_mask"].tolist() == [float(token != example.EOD) for token in text[:-1]]
        assert sample["position_ids"].tolist() == list(range(24))
        assert sample["attention_mask"].tolist() == [[[j > i for j in range(24)] for i in range(24)]]
    assert not dataset[-1]["loss_mask"].any()
    assert dataset[2]["loss_mask"].sum() == 23  # the first document ends in block 2


def micro_batches_of_megatron(ids: list[int], micro_batch: int, rank: int, ranks: int) -> list[list[int]]:
    """Do what MegatronPretrainingSampler.__iter__ does, over a list of indices."""
    batch, out = [], []
    for idx in ids:
        batch.append(idx)
        if len(batch) == micro_batch * ranks:
            out.append(batch[rank * micro_batch : (rank + 1) * micro_batch])
            batch = []
    return out


def test_the_sampler_deals_as_megatrons(tmp_path: Path) -> None:
    example = load("megatron_gpt_dataset")
    plan = preset("lfr").plan(75, 64, 12, train_epochs=3.0)
    curricula = [Curriculum(plan, Journal(tmp_path / str(rank), {}), seed=1) for rank in range(3)]
    samplers = [example.LFRSampler(curriculum, 0, 2, rank, 3) for rank, curriculum in enumerate(curricula)]
    assert len(samplers[0]) == 2 * plan.total_steps
    served = 0
    for phase in plan.phases:
        dealt = [list(sampler) for sampler in samplers]
        steps = [ids for _, ids in curricula[0].remaining_steps()]
        ids = [int(i) for step in steps for i in step]
        assert dealt == [micro_batches_of_megatron(ids, 2, rank, 3) for rank in range(3)]
        served += sum(i >= 0 for rank in dealt for rows in rank for i in rows)
        for step, step_ids in enumerate(steps, phase.first_step):
            union = [i for rank in dealt for rows in rank[2 * (step - phase.first_step) :][:2] for i in rows]
            assert sorted(union) == sorted(step_ids.tolist())
            for curriculum in curricula:
                curriculum.record(step, 1.0 + step_ids % 7, np.ones(12))
    assert served == plan.total_samples
    with pytest.raises(ValueError, match="consumed_samples 12: the curriculum is at step"):
        example.LFRSampler(curricula[0], 12, 2, 0, 3)
    with pytest.raises(ValueError, match="global batch 12: no multiple"):
        example.LFRSampler(curricula[0], 12 * plan.total_steps, 8, 0, 1)


@pytest.mark.slow
def test_the_megatron_loop_on_two_ranks_and_in_two_parts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    out = run("examples/megatron_gpt_dataset.py", "--save", str(two), processes=2)
    assert [line.split()[0] for line in out.splitlines()] == KINDS
    losses = journaled(two / "journal_0")
    assert_focus_meets_noise(losses)
    for mine, other in zip(losses, journaled(two / "journal_1"), strict=True):
        assert mine.tobytes() == other.tobytes()

    shutdown()  # a run in this process may have started torch.distributed, which the example does itself
    example = load("megatron_gpt_dataset")
    example.main(["--save", str(one), "--micro-batch-size", "8", "--exit-interval", "27"])
    example.main(["--save", str(one), "--micro-batch-size", "8", "--resume"])
    for mine, other in zip(losses, journaled(one / "journal_0"), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)

    corpus, plan = plan_of(two, 16, 4.0)
    dataset = example.LFRDataset(corpus.train)
    ids = ids_of_a_plain_loop(losses, plan, tmp_path / "plain")[0]
    batch = {key: torch.stack([dataset[i][key] for i in ids]) for key in dataset[0]}
    torch.manual_seed(0)
    model = example.GPT().double()
    mask = batch.pop("loss_mask").double()
    with torch.no_grad():
        exact = ((model(**batch) * mask).sum(1) / mask.sum(1)).tolist()
    assert losses[0][:16].tolist() == pytest.approx(exact, abs=1e-5)


@pytest.mark.slow
def test_two_versions_in_all_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each way takes the steps that it should; T = 50, of which 30 are a branch's."""
    example = load("versions/run")
    monkeypatch.setattr(example, "VERSIONS", 2)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "out"), "--steps", "50"])
    assert example.main() == 0
    arrivals = json.loads((tmp_path / "out" / "results.json").read_text())["arrivals"]
    assert list(arrivals) == ["mixture", "domains", "domains, replay"]
    for ways in arrivals.values():
        steps = {way: one["steps"] for way, one in ways.items()}
        assert steps == {"from scratch": 50 + 100, "continual": 2 * 50, "path switching": 2 * 50 + 30}
        losses = [one["all"] for way in ways.values() for one in way["versions"]]
        assert all(0.5 < loss < 5 for loss in losses)
        assert len(set(losses)) == 4  # first versions are one: the branch leaves where the warm-up ends
    assert "Held-out loss, nats a byte: domains, replay" in capsys.readouterr().out


@pytest.mark.slow
def test_instructions_with_both_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All arms train on the same number of tokens, and only responses count."""
    example = load("instructions/run")
    monkeypatch.setattr(example, "BASE", ["--train-iters", "2"])
    words = ["--epochs", "0.2", "--records", "400", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "out"), *words])
    assert example.main() == 0
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert set(arms) == {"adamw|uniform", "adamw|lfr", "lora-rite|uniform", "lora-rite|lfr"}
    runs = [one for of_seed in arms.values() for one in of_seed.values()]
    assert len({one["tokens"] for one in runs}) == 1
    assert len({one["loss"] for one in runs}) == 8
    assert all(0 < loss < 10 for one in runs for loss in one["tasks"].values())
    out = capsys.readouterr().out
    assert "Held-out loss, nats a token of a response" in out
    assert "lfr - uniform, lora-rite" in out
    rows = {}
    for name in ("train", "held_out"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        rows[name] = {(row["task"], row["prompt"]) for row in map(json.loads, lines)}
    assert {task for task, _ in rows["train"] & rows["held_out"]} == {"repeat"}
    prefix = tmp_path / "out" / "held_out_add_text_document"
    mask = np.fromfile(f"{prefix}.mask", np.uint8)[56:]
    assert 0 < mask.mean() < 0.5

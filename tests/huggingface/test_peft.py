"""Adapters to and from the `peft` package, as a real client, for models of several families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.evaluation.trained import load_trained
from megatron_lfr.parallel import session
from support.families import make_model
from support.hf_runs import edit
from support.peers import peer

peft: Any = peer("peft")

MODULES = {"gpt2": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
FAMILIES = ("llama, biases of attention", "qwen3", "olmo2", "gpt2")
TOKENS = torch.randint(0, 120, (2, 24), generator=torch.Generator().manual_seed(2))


def theirs(name: str, folder: Path) -> Any:
    """Write a model's folder, and one with adapters of rank 3 whose B is random; return peft's model."""
    make_model(name).save_pretrained(folder / "hf")
    base = AutoModelForCausalLM.from_pretrained(folder / "hf")
    modules = MODULES.get(name, [f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM")
    torch.manual_seed(8)
    adapted = peft.get_peft_model(base, config)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
    adapted.save_pretrained(folder / "peft")
    return adapted.eval()


def convert(kind: str, **flags: object) -> int:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return main(["convert", kind, *[word for word in words if word != "True"]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS).logits
    return result


@torch.no_grad()
def our_logits(run: Path) -> Tensor:
    with session():
        model = load_trained(run).model
        model.unshard()  # type: ignore[operator]
        for layer in model.layers.values():
            layer.unshard()  # type: ignore[operator]
        return model.logits(model.hidden_states(TOKENS).flatten(0, 1)).view(*TOKENS.shape, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_has_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    expected = logits(theirs(name, tmp_path))
    assert convert("from-hf", input=tmp_path / "hf", output=tmp_path / "base") == 0
    assert convert("from-peft", input=tmp_path / "peft", base=tmp_path / "base", output=tmp_path / "run") == 0
    assert (our_logits(tmp_path / "base") - expected).abs().max() > 0.05
    assert (our_logits(tmp_path / "run") - expected).abs().max() < 1e-5

    assert convert("to-peft", run=tmp_path / "run", output=tmp_path / "again") == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "again")).eval()
    assert (logits(again) - expected).abs().max() < 1e-5
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())

    assert convert("to-hf", run=tmp_path / "run", output=tmp_path / "merged", merge=True, verify=True) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - expected).abs().max() < 1e-5


def test_a_run_starts_from_adapters_of_peft_and_gives_them_back(tmp_path: Path) -> None:
    expected = logits(theirs("qwen3", tmp_path))
    assert convert("from-hf", input=tmp_path / "hf", output=tmp_path / "base") == 0
    assert convert("from-peft", input=tmp_path / "peft", base=tmp_path / "base", output=tmp_path / "run") == 0
    with IndexedDatasetWriter(tmp_path / "c_text_document", np.dtype(np.uint16)) as writer:
        writer.add_document(np.random.default_rng(1).integers(0, 120, 200).astype(np.uint16))
    flags = ["--config", tmp_path / "run" / "config.yaml", "--lora-load", tmp_path / "run", "--save", tmp_path / "more"]
    flags += ["--data-path", tmp_path / "c_text_document", "--split", "100,0,0", "--seq-length", 16, "--lr", 1e-6]
    flags += ["--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 5, "--distributed-backend", "gloo"]
    assert main(["train", *map(str, flags)]) == 0
    assert convert("to-peft", run=tmp_path / "more", output=tmp_path / "again") == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "again")).eval()
    assert 0 < (logits(again) - expected).abs().max() < 1e-3
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()) - expected).abs().max() > 0.05


def test_adapters_of_some_modules_are_those_of_the_file(tmp_path: Path) -> None:
    theirs("llama, linear", tmp_path)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "v_proj" in key or "down_proj" in key}, file)
    assert convert("from-hf", input=tmp_path / "hf", output=tmp_path / "base") == 0
    assert convert("from-peft", input=tmp_path / "peft", base=tmp_path / "base", output=tmp_path / "run") == 0
    identity = CheckpointStore(tmp_path / "run" / "checkpoints", keep=None).checkpoint(0).state["identity"]
    assert identity["lora"]["lora_target"] == ["v", "down"]
    assert convert("to-hf", run=tmp_path / "run", output=tmp_path / "merged", merge=True) == 0
    edit(tmp_path / "peft" / "adapter_config.json", target_modules=["v_proj", "down_proj"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert (our_logits(tmp_path / "run") - expected).abs().max() < 1e-5


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs("llama, linear", tmp_path)
    assert convert("from-hf", input=tmp_path / "hf", output=tmp_path / "base") == 0
    sound, key = tmp_path / "peft", "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    tensors = load_file(sound / "adapter_model.safetensors")
    changes: list[tuple[dict[str, object], dict[str, Tensor | None], str]] = [
        ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA'; only LORA can be read"),
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern is"),
        ({"r": 0}, {}, "r is 0; expected a positive integer"),
        ({"r": 4}, {}, "for the base it should be [4, 32]"),
        ({}, {key: None}, f"{key} is missing"),
        ({}, {key: tensors[key] * torch.nan}, "holds numbers that are not finite"),
        ({}, {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)}, "holds base_model.model.lm_head.lora_A"),
    ]
    for number, (settings, changed, message) in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        edit(folder / "adapter_config.json", **settings)
        if changed:
            kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
            save_file(
                {name: tensor.contiguous() for name, tensor in kept.items()}, folder / "adapter_model.safetensors"
            )
        assert convert("from-peft", input=folder, base=tmp_path / "base", output=tmp_path / "run") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert convert("to-peft", run=tmp_path / "base", output=tmp_path / "out") == 2
    assert "has no adapters" in capsys.readouterr().err
    assert convert("to-hf", run=tmp_path / "base", output=tmp_path / "out", merge=True) == 2
    assert "--merge: the run has no adapters" in capsys.readouterr().err


def test_rank_stabilised_adapters_keep_their_factor(tmp_path: Path) -> None:
    theirs("llama, linear", tmp_path)
    edit(tmp_path / "peft" / "adapter_config.json", use_rslora=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval())
    assert convert("from-hf", input=tmp_path / "hf", output=tmp_path / "base") == 0
    assert convert("from-peft", input=tmp_path / "peft", base=tmp_path / "base", output=tmp_path / "run") == 0
    assert (our_logits(tmp_path / "run") - expected).abs().max() < 1e-5
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_rslora"]

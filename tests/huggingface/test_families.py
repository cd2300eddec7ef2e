"""Every family against transformers: logits, gradients, and conversion both ways."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_lfr.cli import main
from megatron_lfr.huggingface.config import from_hf_config, to_hf_config
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.rope import rope_frequencies
from support import family_cases
from support.engine_layouts import ADAMW
from support.families import MODELS, make_model
from support.hf_runs import stored_weights
from support.hf_weights import load_hf, to_hf


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    theirs = make_model(name)
    config, _ = from_hf_config(theirs.config.to_dict())
    assert config.num_parameters() == sum(p.numel() for p in theirs.parameters())
    compare(Decoder(config, seed=1), theirs)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "olmo2"])
def test_compiled_and_recomputed_layers_are_the_same(name: str) -> None:
    theirs = make_model(name)
    config, _ = from_hf_config(theirs.config.to_dict())
    torch._dynamo.reset()
    ours = Decoder(config, seed=1, recompute_granularity="selective")
    ours.layers["0"].compile(fullgraph=True)  # the layers are alike, and the compiler takes its time for each
    compare(ours, theirs)


def compare(ours: Decoder, theirs: PreTrainedModel) -> None:
    config = ours.config
    load_hf(ours, theirs.state_dict())
    tokens = torch.randint(0, 120, (2, 61), generator=torch.Generator().manual_seed(3))
    tokens, labels = tokens[:, :-1], tokens[:, 1:]

    hf_logits = theirs(input_ids=tokens).logits
    logits = ours.logits(ours.hidden_states(tokens).flatten(0, 1)).view_as(hf_logits)
    assert (logits - hf_logits).abs().max() <= 1e-5

    F.cross_entropy(hf_logits.flatten(0, 1), labels.flatten()).backward()
    ours(tokens, labels, torch.full(labels.shape, 1 / labels.numel()))[0].backward()
    gradients = to_hf({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, config)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).abs().max() <= min(1e-5, 1e-3 * expected[key].abs().max() + 1e-8), key


def train(model: PreTrainedModel, count: int) -> list[tuple[float, float]]:
    """Train transformers' model on one process; returns the loss and gradient norm of each of `count` steps."""
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": ADAMW.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(ADAMW.adam_beta1, ADAMW.adam_beta2),
        eps=ADAMW.adam_eps,
    )
    steps = []
    for batch, lr in family_cases.steps(count):
        adamw.zero_grad()
        logits = model(input_ids=batch.tokens).logits
        nll = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        loss = (nll * batch.mask).sum() / batch.mask.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAMW.clip_grad)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        steps.append((loss.item(), float(norm)))
    return steps


def test_trained_in_layouts_and_converted_both_ways(tmp_path: Path) -> None:
    """From transformers to a run, trained on four ranks, and back: as transformers' model that one process trains."""
    folders = {f"model{number}": name for number, name in enumerate(MODELS)}
    for folder, name in folders.items():
        make_model(name).save_pretrained(tmp_path / folder / "hf")
        flags = ("--input", tmp_path / folder / "hf", "--output", tmp_path / folder / "run")
        assert main(["convert", "from-hf", *map(str, flags), "--verify"]) == 0
    mp.start_processes(family_cases.main, (str(tmp_path), folders), nprocs=4, start_method="forkserver")
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for folder, name in folders.items():
        expected = make_model(name)
        steps = torch.tensor(train(expected, family_cases.steps_of(name)))
        for kind in family_cases.engines_of(name):
            for figures in by_rank:
                trained = torch.tensor(figures[folder][kind])
                first = steps[: len(trained)]
                torch.testing.assert_close(trained, first, atol=1e-5, rtol=1e-5, msg=f"{name}, {kind}: {trained}")
        shutil.copy(tmp_path / folder / "run" / "config.yaml", tmp_path / folder / "trained")
        flags = ("--run", tmp_path / folder / "trained", "--output", tmp_path / folder / "back")
        assert main(["convert", "to-hf", *map(str, flags), "--model-type", expected.config.model_type]) == 0
        before, after = (stored_weights(tmp_path / folder / where) for where in ("hf", "back"))
        assert {key: w.shape for key, w in before.items()} == {key: w.shape for key, w in after.items()}
        back = AutoModelForCausalLM.from_pretrained(tmp_path / folder / "back", attn_implementation="eager").eval()
        tokens = torch.randint(0, 120, (2, 60), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits, exact = back(input_ids=tokens).logits, expected(input_ids=tokens).logits
        assert (logits - exact).abs().max() <= 1e-4, name
        assert (logits - make_model(name)(input_ids=tokens).logits).abs().max() > 1e-2  # it has learnt


SIZES = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"add_mlp_bias": True, "sliding_window": 5}, "--sliding-window 5"),
        ({"add_attention_output_bias": True}, "--add-attention-output-bias"),
        ({"swiglu": False}, "--no-swiglu"),
        ({"qk_layernorm": True, "norm_after_sublayers": True}, "--no"),
        (
            {"hidden_size": 36, "num_attention_heads": 8, "kv_channels": 4, "add_mlp_bias": True},
            "--hidden-size 36 is not",
        ),
    ],
)
def test_what_no_family_can_be_is_refused_by_name(changes: dict[str, Any], refused: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot be a model with .*{refused}"):
        to_hf_config(dataclasses.replace(SIZES, **changes), "float32", None)


def test_a_model_that_is_of_several_families_is_written_as_the_first_or_as_asked() -> None:
    assert to_hf_config(SIZES, "float32", None)["model_type"] == "llama"
    assert to_hf_config(SIZES, "float32", None, model_type="mistral")["sliding_window"] is None
    with pytest.raises(ValueError, match=r"^transformers' Qwen2ForCausalLM cannot be a model with --no-add-qkv-bias$"):
        to_hf_config(SIZES, "float32", None, model_type="qwen2")
    with pytest.raises(ValueError, match=r"^--model-type gemma: choose from llama, "):
        to_hf_config(SIZES, "float32", None, model_type="gemma")


def test_both_spellings_of_positions_are_read() -> None:
    model = make_model("llama, yarn").config.to_dict()
    rope = model.pop("rope_parameters")
    older = {**model, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert from_hf_config(older)[0] == from_hf_config(make_model("llama, yarn").config.to_dict())[0]
    by_scales = {**rope, "mscale": 0.8, "mscale_all_dim": 0.4}
    config, _ = from_hf_config({**older, "rope_scaling": by_scales})
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**{**older, "rope_scaling": by_scales}), "cpu")
    assert config.yarn_attention_factor == pytest.approx(factor)
    torch.testing.assert_close(rope_frequencies(config), frequencies)


def test_dynamic_positions_beyond_the_original_length_are_transformers() -> None:
    theirs = make_model("llama, dynamic")
    config = dataclasses.replace(from_hf_config(theirs.config.to_dict())[0], max_position_embeddings=200)
    ours = Decoder(config, seed=1)
    load_hf(ours, theirs.state_dict())
    tokens = torch.randint(0, 120, (1, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = theirs(input_ids=tokens).logits[0]
        assert (ours.logits(ours.hidden_states(tokens)[0]) - logits).abs().max() <= 1e-5
    assert to_hf_config(config, "float32", None)["max_position_embeddings"] == 64


def test_gpt2s_folder_without_a_head_and_with_masks_is_read(tmp_path: Path) -> None:
    """As the folder that OpenAI's weights are published in."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "hf")
    weights = {name.removeprefix("transformer."): w for name, w in stored_weights(tmp_path / "hf").items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    flags = ("--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run"))
    assert main(["convert", "from-hf", *flags]) == 0
    stored = stored_weights(tmp_path / "run" / "checkpoints" / "iter_0000000")
    assert torch.equal(stored["model.position_embedding.weight"], model.transformer.wpe.weight)

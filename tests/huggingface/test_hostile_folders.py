"""Hugging Face folders that are not what they should be: each is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lfr.cli import main
from megatron_lfr.huggingface.stream import SafetensorsStream
from support.hf_runs import BASE, edit, make_run, make_tokenizer, stored_weights

EMBEDDING = "model.embed_tokens.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sound folder in several files."""
    folder = tmp_path_factory.mktemp("sound")
    make_run(folder / "run", BASE)
    flags = ("--run", str(folder / "run"), "--output", str(folder / "hf"), "--max-shard-size", "60KB")
    assert main(["convert", "to-hf", *flags]) == 0
    return folder / "hf"


@pytest.fixture
def hf(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "hf"))


def refusal(hf: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `from-hf` prints, after it has ended with 2 and has left nothing."""
    output = hf.with_name("run")
    capsys.readouterr()
    assert main(["convert", "from-hf", "--input", str(hf), "--output", str(output)]) == 2
    assert {path.name for path in hf.parent.iterdir()} == {"hf"}
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures ['MistralForCausalLM'] is not supported"),
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; only llama, mistral, qwen2,"),
        ({"model_type": "qwen2"}, "only ['Qwen2ForCausalLM'] is"),
        ({"attention_bias": True}, "the weight model.layers.0.self_attn.q_proj.bias is missing"),
        ({"mlp_bias": True}, "the weight model.layers.0.mlp.gate_proj.bias is missing"),
        ({"mlp_bias": 1}, "mlp_bias is 1; expected true or false"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "layer_types": ["full_attention", 1]},
            "a window in some layers alone is not supported",
        ),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown key 'auto_map'"),
        ({"logit_scale": 0.5}, "unknown key 'logit_scale' (0.5)"),
        ({"logit_scale": 0.5}, "with --allow-config-key logit_scale"),
        ({"rope_interleaved": True}, "unknown key 'rope_interleaved' (True); it changes nothing only as False"),
        ({"pretraining_tp": 0}, "pretraining_tp is 0; expected a positive integer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": LLAMA3}, "disagree"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_type is given twice, as 'llama3' and, under type,"),
        ({"rope_scaling": {**LLAMA3, "rope_theta": 7.0}, "rope_parameters": LLAMA3}, "as 7.0 and as 10000.0"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "disagree"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_parameters": {"mscale": 1.0}}, "rope parameter 'mscale' is not supported"),
        ({"rope_parameters": [1]}, "expected an object"),
        ({"rope_theta": 5.0}, "rope_theta is given twice, as 10000.0 and as 5.0"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is 1073741824, but it holds 29 weights"),
        ({"num_hidden_layers": 2}, "holds the weight model.layers.2."),
        ({"num_hidden_layers": 4}, "the weight model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776; expected a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads is True; expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a positive integer"),
        ({"head_dim": 15}, "must be even"),
        ({"hidden_size": 66, "head_dim": None}, "head_dim is missing, and hidden_size 66 is not a multiple"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive integer"),
        ({"vocab_size": 2**30}, f"{EMBEDDING} is [101, 64]; after config.json it should be [1073741824, 64]"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"tie_word_embeddings": False}, "the weight lm_head.weight is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'; expected a positive, finite number"),
        ({"final_logit_softcapping": 0.5}, "--final-logit-softcapping 0.5: must be at least 1"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_configurations(changes: dict[str, object], message: str, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(hf / "config.json", **changes)
    assert message in refusal(hf, capsys)


def test_keys_that_change_nothing_pass_with_a_note(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    edit(hf / "config.json", **harmless, pretraining_tp=2, logit_scale=0.5, extra_key=[1])
    assert "unknown key 'logit_scale'" in refusal(hf, capsys)
    flags = ("--input", str(hf), "--output", str(hf.with_name("run")), "--allow-config-key", "logit_scale")
    assert main(["convert", "from-hf", *flags]) == 2
    assert "unknown key 'extra_key' ([1])" in capsys.readouterr().err
    assert main(["convert", "from-hf", *flags, "--allow-config-key", "extra_key", "--allow-config-key", "gone"]) == 0
    out = capsys.readouterr().out
    for note in (
        "is_llama_config, rope_interleaved, transformers.js_config: left out, as they do not change the logits",
        "logit_scale, extra_key: let through by --allow-config-key",
        "gone: --allow-config-key names it, but it is not there",
        "pretraining_tp 2: left out",
    ):
        assert f"note: config.json: {note}" in out


def test_a_flag_does_not_let_through_what_the_model_cannot_follow(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(hf / "config.json", quantization_config={"bits": 4})
    flags = ("--input", str(hf), "--output", str(hf.with_name("run")), "--allow-config-key", "quantization_config")
    assert main(["convert", "from-hf", *flags]) == 2
    assert "quantization_config {'bits': 4} is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("model.norm.weight"), "holds the weight model.norm.weight, which model.safetensors."),
        (lambda index: index.update({"gone": index[EMBEDDING]}), "gone should be in model-00001-of-"),
        (lambda index: index.update({EMBEDDING: index["model.norm.weight"]}), f"{EMBEDDING} should be in model-"),
    ],
)
def test_an_index_and_its_files_hold_the_same_weights(
    change: Callable[[dict[str, str]], object], message: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert message in refusal(hf, capsys)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udce4"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_object(text: str, name: str, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / name).write_text(text, errors="surrogateescape")
    assert str(hf / name) in refusal(hf, capsys)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        "model.bin",
        7,
        None,
        ["x"],
        "a\0.safetensors",
    ],
)
def test_an_index_names_files_of_the_folder_alone(name: object, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({EMBEDDING: torch.zeros(101, 64)}, hf.parent / "secret.safetensors")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBEDDING] = name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    output = hf.with_name("run")
    capsys.readouterr()
    assert main(["convert", "from-hf", "--input", str(hf), "--output", str(output)]) == 2
    assert "is not the name of a safetensors file in this folder" in capsys.readouterr().err
    assert not output.exists()


def with_weights(hf: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the folder's weights again, changed, into one file."""
    tensors = stored_weights(hf)
    for path in [*hf.glob("*.safetensors"), hf / "model.safetensors.index.json"]:
        path.unlink()
    change(tensors)
    save_file(tensors, hf / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "the weight model.norm.weight is missing"),
        (lambda w: w.update({"extra": torch.ones(1)}), "holds the weight extra"),
        (lambda w: w.update({"model.norm.weight": torch.ones(63)}), "model.norm.weight is [63]"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64, 1)}), "model.norm.weight is [64, 1]"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}), "model.norm.weight is I64"),
        (lambda w: w.update({"lm_head.weight": torch.ones(101, 64)}), "lm_head.weight is not the embedding"),
        (lambda w: w["model.norm.weight"].fill_(float("inf")), "model.norm.weight holds numbers that are not finite"),
        (lambda w: w["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")), "mlp.up_proj.weight holds numbers"),
    ],
)
def test_weights(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_weights(hf, change)
    assert message in refusal(hf, capsys)


def test_a_tied_copy_and_old_angles_are_left_out(hf: Path) -> None:
    before = stored_weights(hf)
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    with_weights(hf, lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone(), **angles}))
    for command in (
        ["from-hf", "--input", str(hf), "--output", str(hf.with_name("run"))],
        ["to-hf", "--run", str(hf.with_name("run")), "--output", str(hf.with_name("again"))],
    ):
        assert main(["convert", *command]) == 0
    after = stored_weights(hf.with_name("again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_embedding_may_stand_under_the_output_s_name(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored_weights(hf)
    with_weights(hf, lambda w: w.update({"lm_head.weight": w.pop(EMBEDDING)}))
    assert main(["convert", "from-hf", "--input", str(hf), "--output", str(hf.with_name("run")), "--verify"]) == 0
    assert "largest difference from transformers" in capsys.readouterr().out
    ours = stored_weights(hf.with_name("run") / "checkpoints" / "iter_0000000")["model.embedding.weight"]
    assert torch.equal(ours[:101], before[EMBEDDING])
    shutil.rmtree(hf.with_name("run"))
    edit(hf / "config.json", tie_word_embeddings=False)
    assert f"the weight {EMBEDDING} is missing" in refusal(hf, capsys)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: b"", lambda data: data + b"x"]
)
def test_damaged_files(damage: Callable[[bytes], bytes], hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted(hf.glob("*.safetensors"))[1]
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: not a safetensors file" in refusal(hf, capsys)


def test_a_weight_in_two_files(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted(hf.glob("*.safetensors"))[1]
    path.write_bytes(sorted(hf.glob("*.safetensors"))[0].read_bytes())
    assert f"{path}: the weight {EMBEDDING} is in model-00001-of-" in refusal(hf, capsys)


def test_pickles_are_never_read(hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hf.parent)
    for path in [*hf.glob("*.safetensors"), hf / "model.safetensors.index.json"]:
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    message = refusal(hf, capsys)
    assert "PyTorch pickles alone" in message
    assert "save_pretrained" in message


def test_a_tokenizer_that_is_none(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "tokenizer.json").write_text("{}")
    assert "not a tokenizer file" in refusal(hf, capsys)


def test_a_tokenizer_with_more_tokens_than_rows(
    hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(hf / "tokenizer.json", 103)
    monkeypatch.setattr(SafetensorsStream, "__init__", None)  # no weight is written first
    message = refusal(hf, capsys)
    assert "needs 103 rows, vocab_size in config.json is 101; without one: 'w101' (101), '</s>' (102)" in message
    assert "resize_token_embeddings(103)" in message

"""Conversions against transformers and the safetensors library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint.tensors import StoredTensors
from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig
from megatron_lfr.huggingface.config import from_hf_config
from megatron_lfr.huggingface.verify import verify
from megatron_lfr.model import Decoder
from support import kill_cases, two_rank_checkpoints
from support.hf_runs import BASE, MODELS, edit, make_run, make_tokenizer, stored_weights
from support.ports import free_port

SECOND_END = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "id": 9,
    "content": "w9",
    "special": True,
}
"""Word 9 as a special token."""


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_is_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_run(tmp_path / "run", MODELS[name])
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf", "--verify") == 0
    assert convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back", "--verify") == 0
    assert capsys.readouterr().out.count("largest difference from transformers") == 2
    flags = ("--run", tmp_path / "back", "--output", tmp_path / "again")
    assert convert("to-hf", *flags, "--max-shard-size", "60KB") == 0
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    once, twice = stored_weights(tmp_path / "hf"), stored_weights(tmp_path / "again")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    ours = stored_weights(tmp_path / "back" / "checkpoints" / "iter_0000000")
    assert ours.keys() == {f"model.{key}" for key, _ in model.named_parameters()}
    assert all(torch.equal(ours[f"model.{key}"], value) for key, value in model.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)  # all shards are found
    assert all(torch.equal(value, once[key]) for key, value in loaded.state_dict().items() if key in once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_is_read(
    dtype: torch.dtype, tmp_path: Path, forbid_drawing: Callable[[], None]
) -> None:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=77,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    forbid_drawing()
    assert convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "run", "--verify") == 0
    flags = ("--run", tmp_path / "run", "--output", tmp_path / "back", "--dtype", str(dtype).removeprefix("torch."))
    assert convert("to-hf", *flags, "--verify") == 0
    before, after = stored_weights(tmp_path / "hf"), stored_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {dtype}


def test_generation_is_greedy_decoding_with_our_logits(tmp_path: Path) -> None:
    config = MODELS["untied, grouped queries"]
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", 101)
    model = make_run(tmp_path / "run", config, tokenizer)
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 100
    inputs = AutoTokenizer.from_pretrained(tmp_path / "hf")("w5", return_tensors="pt")
    expected = inputs.input_ids
    assert expected.tolist() == [[5]]
    with torch.no_grad():
        for _ in range(40):
            hidden = model.hidden_states(expected)[:, -1]
            logits = F.linear(hidden, model.output_weight)[:, :101]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
            if expected[0, -1] == 100:
                break
    generated = loaded.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert generated.tolist() == expected.tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "</s>"


@pytest.mark.parametrize("starts", [True, False])
def test_what_starts_documents_goes_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], starts: bool
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", 101, start=3)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="w7")
    make_run(tmp_path / "run", BASE, tokenizer)
    path = tmp_path / "run" / "config.yaml"
    config = {**yaml.safe_load(path.read_text()), "bos": starts, "eod_token": "</s>"}  # by a flag, not the file's
    path.write_text(yaml.safe_dump(config))
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    assert (
        "documents started with no token, but transformers starts texts with w3" in capsys.readouterr().out
    ) != starts
    expected = 3 if starts else None
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (expected, 100)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs("w5").input_ids, theirs.eos_token) == ([3, 5], "</s>")
    assert theirs.bos_token == ("w3" if starts else None)
    assert convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back") == 0
    back = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
    assert (back["bos"], back["eod_token"]) == (True, "</s>")


def test_a_chat_models_ends_and_template_go_there_and_back(tmp_path: Path) -> None:
    """transformers ends a generation where it does with the original."""
    make_run(tmp_path / "run", BASE, make_tokenizer(tmp_path / "tokenizer.json", 101))
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    edit(tmp_path / "hf" / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], SECOND_END])
    edit(tmp_path / "hf" / "generation_config.json", eos_token_id=[100, 9], pad_token_id=3, top_p=0.9)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    assert convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back") == 0
    assert convert("to-hf", "--run", tmp_path / "back", "--output", tmp_path / "again") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.top_p) == ([100, 9], 3, 0.9)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == "{{ messages }}"
    # A run whose documents end otherwise says so.
    edit(tmp_path / "back" / "tokenizer" / "generation_config.json", eos_token_id=[9, 8])
    assert convert("to-hf", "--run", tmp_path / "back", "--output", tmp_path / "other") == 0
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["eos_token_id"] == 100


def test_files_that_disagree_about_the_end_name_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", BASE, make_tokenizer(tmp_path / "tokenizer.json", 101))
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    edit(tmp_path / "hf" / "tokenizer_config.json", eos_token="w7")
    words = ("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    capsys.readouterr()
    assert convert(*words) == 0
    out = capsys.readouterr().out
    assert 'its files disagree: tokenizer_config.json names "w7" (id 7)' in out
    assert "name it with --eod-token" in out
    assert "--finetune --eod-token TOKEN" in out
    assert yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())["eod_token"] is None
    words = ("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "named")
    assert convert(*words, "--eod-token", "w7") == 0
    assert yaml.safe_load((tmp_path / "named" / "config.yaml").read_text())["eod_token"] == "w7"
    assert "--eod-token TOKEN" not in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoints_of_two_ranks(tmp_path: Path) -> None:
    port = free_port()
    mp.start_processes(two_rank_checkpoints.save, (str(tmp_path), port), nprocs=2, start_method="forkserver")
    expected = {
        f"model.{name}": value for name, value in Decoder(BASE, seed=two_rank_checkpoints.SEED).named_parameters()
    }
    for name in two_rank_checkpoints.LAYOUTS:
        run = tmp_path / name
        assert len(list(run.glob("checkpoints/iter_0000001/shard-*"))) == 2
        (run / "config.yaml").write_text(RunConfig(model=BASE).to_yaml())
        assert convert("to-hf", "--run", run, "--output", tmp_path / f"{name}-hf") == 0
        assert convert("from-hf", "--input", tmp_path / f"{name}-hf", "--output", tmp_path / f"{name}-back") == 0
        stored = stored_weights(tmp_path / f"{name}-back" / "checkpoints" / "iter_0000000")
        assert all(torch.equal(stored[key], value) for key, value in expected.items())


def test_an_iteration_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", BASE)
    flags = ("--run", tmp_path / "run", "--output", tmp_path / "hf")
    assert convert("to-hf", *flags, "--iteration", 6) == 2
    assert "no checkpoint of iteration 6; there are: 5, 7" in capsys.readouterr().err
    assert convert("to-hf", *flags, "--iteration", 5) == 0
    assert not any(tensor.any() for tensor in stored_weights(tmp_path / "hf").values())


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", BASE)
    tensors = stored_weights(tmp_path / "run" / "checkpoints" / "iter_0000007")
    tensors["model.layers.1.attention.qkv.weight"][5, 5] = torch.nan
    CheckpointStore(tmp_path / "run" / "checkpoints", keep=None).save(8, tensors, {})
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 2
    assert "holds numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf", "--iteration", 7) == 0


def test_verify_notices_another_model(tmp_path: Path) -> None:
    make_run(tmp_path / "run", MODELS["untied, grouped queries"])
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    edit(tmp_path / "hf" / "config.json", rms_norm_eps=2e-3)
    folder = tmp_path / "run" / "checkpoints" / "iter_0000007"
    with pytest.raises(ValueError, match="the two are not the same model"):
        verify(StoredTensors(folder), MODELS["untied, grouped queries"], tmp_path / "hf", torch.float32)


def test_a_cap_of_the_logits_comes_in_and_does_not_go_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' Llama would leave it out, and be another model."""
    make_run(tmp_path / "run", BASE)
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert from_hf_config({**settings, "final_logit_softcapping": None})[0].final_logit_softcapping == 0.0
    edit(tmp_path / "hf" / "config.json", final_logit_softcapping=2)
    capsys.readouterr()
    assert convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "capped", "--verify") == 0
    out = capsys.readouterr().out
    assert "final_logit_softcapping 2.0: the run caps its logits so, which transformers' LlamaForCausalLM leaves" in out
    largest = re.search(r"largest logit ([\d.]+)", out)
    assert largest is not None
    assert 1.0 < float(largest[1]) <= 2.0
    assert yaml.safe_load((tmp_path / "capped" / "config.yaml").read_text())["final_logit_softcapping"] == 2.0
    assert convert("to-hf", "--run", tmp_path / "capped", "--output", tmp_path / "back") == 2
    assert "LlamaForCausalLM cannot be a model with --final-logit-softcapping 2.0" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run", BASE)
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "hf") == 0
    output = tmp_path / "output"
    paths = (str(tmp_path / "run"), str(tmp_path / "hf"), str(output))
    mp.start_processes(kill_cases.kill_all, paths, nprocs=1, start_method="forkserver")
    left = sorted(path.name for path in output.iterdir())
    assert len(left) == 2 * len(kill_cases.MOMENTS)
    assert all(name.startswith(".") and name.endswith(".partial") for name in left)
    assert convert("to-hf", "--run", tmp_path / "run", "--output", output / "to-hf-1") == 0
    assert convert("from-hf", "--input", output / "to-hf-1", "--output", output / "from-hf-1", "--verify") == 0
    assert not (output / ".to-hf-1.partial").exists()
    assert not (output / ".from-hf-1.partial").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["to-hf", "--run", "nowhere"], "not a run folder"),
        (["to-hf", "--run", "run", "--max-shard-size", "5"], "expected a number and KB, MB, GB"),
        (["to-hf", "--run", "run", "--max-shard-size", "0GB"], "expected a number and KB, MB, GB"),
        (["from-hf", "--input", "nowhere"], "no such folder"),
        (["from-hf", "--input", "run"], "config.json: no such file"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", BASE)
    words = [str(tmp_path / word) if word in ("run", "nowhere") else word for word in flags]
    assert convert(*words, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert convert("to-hf", "--run", tmp_path / "run", "--output", tmp_path / "run") == 2
    assert "exists already" in capsys.readouterr().err

"""What a run is: a command that contradicts it is refused, and changes no byte of any folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig, parse_run_config
from megatron_lfr.identity import weights_identity
from megatron_lfr.model import ModelConfig
from support.stopped_run import content, refusal
from support.tiny_run import tiny_flags

IDENTITY = [
    ("--rotary-base 7", "--rotary-base 7.0, the run has 10000.0"),
    ("--norm-epsilon 0.1", "--norm-epsilon 0.1, the run has 1e-05"),
    ("--final-logit-softcapping 30", "--final-logit-softcapping 30.0, the run has 0.0"),
    ("--use-rope-scaling", "--use-rope-scaling True, the run has False"),
    ("--num-attention-heads 2", "--num-attention-heads 2, the run has 4"),
    ("--num-query-groups 4", "--num-query-groups 4, the run has 2"),
    ("--kv-channels 4", "--kv-channels 4, the run has 8"),
    ("--ffn-hidden-size 32", "--ffn-hidden-size 32, the run has 64"),
    ("--hidden-size 16", "--hidden-size 16, the run has 32"),
    ("--num-layers 1", "--num-layers 1, the run has 2"),
    ("--untie-embeddings-and-output-weights", "--untie-embeddings-and-output-weights True, the run has False"),
    ("--vocab-size 65", "--vocab-size 65, the run has 64"),
    ("--make-vocab-size-divisible-by 128", "--make-vocab-size-divisible-by 128, the run has 1"),
    ("--init-method-std 0.1", "--init-method-std 0.1, the run has 0.02"),
    ("--seed 5", "--seed 5, the run has 1234"),
    ("--seq-length 8", "--seq-length 8, the run has 16"),
    ("--split 80,20,0", "--split 80,20,0, the run has 90,10,0"),
    ("--global-batch-size 16", "--global-batch-size 16, the run has 8"),
    ("--lfr-schedule learn-only", "--lfr-schedule learn-only, the run has uniform"),
    ("--lfr-focus-scope per-corpus", "--lfr-focus-scope per-corpus, the run has global"),
    ("--train-epochs 1", "--train-epochs 1.0, the run has 0.5 (a run that has begun keeps its length"),
]


@pytest.mark.parametrize(("flags", "message"), IDENTITY, ids=[flags.split()[0] for flags, _ in IDENTITY])
def test_another_run_is_refused_by_its_flags(
    flags: str, message: str, trained: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = trained
    before = content(folder)
    printed = refusal([*args, *flags.split()], capsys)
    assert message in printed
    assert printed.count(", the run has") == 1  # what follows from it is not listed
    assert content(folder) == before


PARTS: dict[str, Any] = {
    "swiglu": False,
    "normalization": "LayerNorm",
    "norm_after_sublayers": True,
    "qk_layernorm": True,
    "qk_layernorm_across_heads": True,
    "disable_bias_linear": False,
    "add_qkv_bias": True,
    "add_attention_output_bias": True,
    "add_mlp_bias": True,
    "sliding_window": 5,
    "position_embedding_type": "learned_absolute",
    "rope_scaling_type": "linear",
    "yarn_beta_fast": 3.0,
    "yarn_beta_slow": 3.0,
    "yarn_truncate": False,
    "yarn_attention_factor": 2.0,
}
"""What a model is made of: settings that runs of earlier versions did not have."""


@pytest.mark.parametrize("name", PARTS)
def test_each_part_of_a_model_is_a_fact_where_it_is_not_a_llamas(name: str) -> None:
    changes: dict[str, Any] = {"qk_layernorm": True} if name.startswith("qk") else {}
    if name.startswith(("rope", "yarn")):
        changes = {"use_rope_scaling": True, "rope_scaling_type": "yarn"}
    plain = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=9)
    before = dataclasses.replace(plain, **({} if name == "qk_layernorm" else changes))
    after = dataclasses.replace(before, **{name: PARTS[name]})
    facts = [weights_identity(model, None)["model"] for model in (before, after)]
    assert facts[0] != facts[1]
    assert not PARTS.keys() & weights_identity(plain, None)["model"].keys()


def test_each_setting_is_compared_or_recorded(
    trained: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """No setting is forgotten: what is not among those above may change."""
    compared = {flags.split()[0][2:].replace("-", "_") for flags, _ in IDENTITY}
    compared |= {"rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"}  # with --use-rope-scaling
    compared |= {"rope_original_max_position_embeddings", "train_iters", "train_samples", "data_path", "data_args_path"}
    compared |= {"tokenizer_model", "eod_token", "bos", "eod_mask_loss", "reset_position_ids", "reset_attention_mask"}
    config = RunConfig()
    shapes = {f.name for part in (config.model, config.data, config.lfr) for f in dataclasses.fields(part)}
    compared |= {"replay", *PARTS}  # with several segments
    compared |= {"lfr_scores", "lfr_clusters"}  # test_scores.py, test_content_clusters.py: files that phases use
    assert shapes - compared <= {"max_position_embeddings", "prefetch", "lfr_scratch_dir", "valid_data_path"}


def test_other_corpora_are_refused(
    trained: tuple[list[str], Path], corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = trained
    before = content(folder)
    assert "--data-path names 1 prefixes, the run has 2" in refusal([*args, "--data-path", corpus[0]], capsys)
    swapped = refusal([*args, "--data-path", *reversed(corpus)], capsys)
    assert "--data-path: prefix 1 of 2 is not the run's, or has changed" in swapped
    weights = refusal([*args, "--data-path", "1", corpus[0], "2", corpus[1]], capsys)
    assert f"--data-path 1 {corpus[0]} 2 {corpus[1]}, the run has {corpus[0]}" in weights
    iters = ["--train-iters", "9"]
    at = args.index("--train-epochs")
    second = args.index("--train-epochs", at + 1)
    bare = [word for i, word in enumerate(args) if i not in (at, at + 1, second, second + 1)]
    assert "--train-iters 9, the run has --train-epochs 0.5" in refusal([*bare, *iters], capsys)
    assert content(folder) == before


def test_an_edited_schedule_or_tokenizer_has_changed_since(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("- {kind: learn, duration: 4, unit: steps}\n")
    at = (flags := tiny_flags(corpus)).index("--train-epochs")
    args = [*flags[:at], *flags[at + 2 :], "--lfr-schedule", str(schedule), "--save", str(tmp_path / "run")]
    assert main(["train", *args, "--exit-interval", "2"]) == 75
    schedule.write_text("- {kind: learn, duration: 5, unit: steps}\n")
    assert f"--lfr-schedule {schedule} has changed since the run began" in refusal(args, capsys)


def test_weights_are_used_as_they_were_trained(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--finetune, evaluate and convert compare with what the checkpoint remembers."""
    args, folder = trained
    before = content(folder)
    flags = [*args, "--load", str(folder), "--finetune", "--save", str(tmp_path / "tuned")]
    message = refusal([*flags, "--rotary-base", "7"], capsys)
    assert f"--load {folder}" in message
    assert "--rotary-base 7.0, the run has 10000.0" in message
    assert not (tmp_path / "tuned").exists()
    assert "choose from num_layers, hidden_size" in refusal([*flags, "--finetune-change", "colour"], capsys)
    assert (
        main(["train", *flags, "--rotary-base", "7", "--finetune-change", "rotary_base", "--exit-interval", "1"]) == 75
    )
    assert content(folder) == before
    capsys.readouterr()
    flags += ["--rotary-base", "7"]
    assert main(["train", *flags, "--exit-interval", "2"]) == 75
    assert f"at step 1 of 13 (--load {folder} was only used at its start)" in (out := capsys.readouterr().out)
    assert "--finetune-change rotary_base -> none" in out
    edited = tmp_path / "edited"
    shutil.copytree(folder, edited)
    config = yaml.safe_load((edited / "config.yaml").read_text()) | {"norm_epsilon": 0.5}
    (edited / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (["evaluate", "--run"], ["convert", "to-hf", "--output", str(tmp_path / "hf"), "--run"]):
        assert main([*command, str(edited)]) == 2
        assert "--norm-epsilon 0.5, the run has 1e-05" in capsys.readouterr().err
    config |= {"norm_epsilon": 1e-5, "split": "80,20,0"}
    (edited / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", "--run", str(edited)]) == 2
    assert "its corpus has changed since it was trained on" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(edited), "--split", "all"]) == 0
    assert main(["evaluate", "--run", str(folder)]) == 0


def test_paths_are_compared_as_places(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, folder = trained
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    for load in (f"{folder}/", str(tmp_path / "link"), "run", f"../{folder.parent.name}/run/."):
        parse_run_config([*args, "--load", load])[0].checkpoint.validate()  # the same folder: goes on with the run
        assert "must be another folder" in refusal([*args, "--load", load, "--finetune"], capsys)

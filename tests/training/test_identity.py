"""What a run is: a command that contradicts it is refused, and changes no byte of any folder."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig, parse_run_config
from megatron_lfr.fileio import lock_file
from megatron_lfr.identity import weights_identity
from megatron_lfr.lfr import Journal
from megatron_lfr.model import ModelConfig
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.start import Start, open_journal
from support.tiny_run import tiny_flags

FLAGS = ["--train-epochs", "0.5", "--lfr-schedule", "uniform", "--save-interval", "4", "--log-interval", "4"]


@pytest.fixture(scope="module")
def trained(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return (flags, folder) of a run that was asked to stop at step 8, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("identity") / "run"
    args = [*tiny_flags(corpus), *FLAGS, "--save", str(folder)]
    assert main(["train", *args, "--exit-interval", "8"]) == 75
    return args, folder


def content(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *args]) == 2
    return capsys.readouterr().err


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
    assert shapes - compared <= {"max_position_embeddings", "prefetch", "lfr_scratch_dir"}


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


REFUSALS = ["--lr 0", "--save-interval 0", "--tokenizer-model nowhere.json", "--data-path nowhere"]


def test_no_refusal_changes_a_byte(
    trained: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refusals of every stage: flags, files, the disk, the lock, damaged checkpoints, a journal that was cut off."""
    args, _ = trained
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    args = [*args, "--save", str(folder)]
    for flags in REFUSALS:
        before = content(folder)
        refusal([*args, *flags.split()], capsys)
        assert content(folder) == before, flags
    with (folder / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in refusal(args, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert "GB free" in refusal(args, capsys)
    assert content(folder) == before
    for name, keep in (("journal/phase_000.npy", 140), ("metrics.jsonl", 10), ("journal/meta.json", 5)):
        path = folder / name
        content_before = path.read_bytes()
        path.write_bytes(content_before[:keep])
        before = content(folder)
        assert name in refusal(args, capsys)
        assert content(folder) == before, name
        path.write_bytes(content_before)
    meta = json.loads((folder / "journal/meta.json").read_text())
    (folder / "journal/meta.json").write_text(json.dumps(meta | {"format": 99}))
    before = content(folder)
    assert "meta.json: format 99: this version of megatron_lfr reads format 2" in refusal(args, capsys)
    assert content(folder) == before
    (folder / "journal/meta.json").write_text(json.dumps(meta))
    entries = np.load(folder / "journal/phase_000.npy")
    assert len(entries) == 64  # the run goes on after all that
    assert main(["train", *args, "--exit-interval", "9"]) == 75
    assert RunFolder(folder).history.entries[-1]["step"] == 8


DAMAGE = {
    "config.yaml is a folder": ("config.yaml", None, "config.yaml: is a folder"),
    "checkpoints is a file": ("checkpoints", b"", "checkpoints: is no folder"),
    "tensorboard is a file": ("tensorboard", b"", "tensorboard: is no folder"),
    "settings are a list": (
        "config_history.yaml",
        b"- {step: 0, folder: /, settings: [1]}",
        "expected a list of entries",
    ),
    "one value changed": (
        "config_history.yaml",
        b"- {step: 0, folder: /, changed: {lr: 1}}",
        "expected a list of entries",
    ),
    "code in YAML": ("config_history.yaml", b"!!python/object/apply:os.system [ls]", "config_history.yaml: not YAML"),
    "deep YAML": ("config_history.yaml", b"[" * 3000, "config_history.yaml: not YAML: maximum recursion depth"),
    "no segment": (
        "journal/meta.json",
        b'{"format": 2, "segments": []}',
        "meta.json: segments: expected a list of one or more",
    ),
    "deep JSON": ("journal/meta.json", b"[" * 100_000, "meta.json: not readable as JSON"),
    "another metrics.jsonl": ("metrics.jsonl", b"[" + b" " * 20_000 + b"]\n", "no line ends after"),
    "no metrics": ("metrics.jsonl", b"\xff\n" * 5000, "metrics.jsonl:1: not JSON"),
}


@pytest.mark.parametrize(("name", "replacement", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_no_runs_is_refused_before_anything_is_written(
    name: str,
    replacement: bytes | None,
    message: str,
    trained: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """replacement: what is in its place, None for a folder."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    else:
        (folder / name).unlink()
    if replacement is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(replacement)
    before = content(folder)
    assert message in refusal(args, capsys)
    assert content(folder) == before


def test_a_checkpoint_knows_the_losses_that_led_to_it(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A journal of another run of the same settings makes the same orders until a Focus, and is not this run's."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    entries = np.load(path := folder / "journal/phase_000.npy")
    entries[3] += 0.25
    path.write_bytes(path.read_bytes()[:128] + entries.tobytes())
    before = content(folder)
    assert "its losses are not those that led to the checkpoint" in refusal(args, capsys)
    assert content(folder) == before


def test_a_checkpoint_under_another_number_is_refused(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    shutil.copytree(folder / "checkpoints/iter_0000008", folder / "checkpoints/iter_0000012")
    assert "state.json: belongs to step 8, but its folder's name to 12" in refusal(args, capsys)


def test_files_that_are_no_runs_are_not_replaced(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("mine")
        assert f"{name} there is no run's" in refusal(tiny_args, capsys)
        assert content(tmp_path / "run") == {name: b"mine"}
        (tmp_path / "run" / name).unlink()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "not a folder" in refusal([*tiny_args, "--save", str(tmp_path / "link")], capsys)


def test_a_journal_that_leads_to_another_order_stays_as_it_is(tmp_path: Path) -> None:
    """The journal is replayed before it is cut back."""
    from megatron_lfr.lfr import Curriculum, preset

    plan = preset("lfr-v1").plan(40, 4, 8)

    def curriculum() -> Curriculum:
        return Curriculum(plan, Journal(tmp_path / "journal", {}), 1)

    first = curriculum()
    rng = np.random.default_rng(2)
    for step, _ in first.steps():
        first.record(step, rng.gamma(4, 1, 8).astype(np.float32), np.ones(8))
        if step == 6:  # in the first focus
            state = first.state_dict()
    first.state_dict()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="replays to an order other than"):
        curriculum().load_state_dict(state | {"order_hash": "0" * 16})
    with pytest.raises(ValueError, match="replays to step 7, but the checkpoint is at 3"):
        curriculum().load_state_dict(state | {"step": 3})
    assert content(tmp_path) == before


def test_a_refused_new_run_leaves_nothing(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*tiny_args, "--save", str(tmp_path / "a/b")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["train", *args]) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/notes.txt").write_text("mine")
    before = content(tmp_path / "a")
    assert main(["train", *args]) == 2
    assert content(tmp_path / "a") == before


def test_a_setting_that_changes_is_printed_and_recorded(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, path = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], path)
    assert main(["train", *args, "--lr", "0.5", "--exit-interval", "12"]) == 75
    out = capsys.readouterr().out
    assert "settings that change from step 8 on: --lr 0.01 -> 0.5, --exit-interval 8 -> 12" in out
    last = RunFolder(path).history.entries[-1]
    assert (last["step"], last["changed"]) == (8, {"lr": [0.01, 0.5], "exit_interval": [8, 12]})
    assert RunFolder(path).recorded_settings["lr"] == 0.5
    shutil.rmtree(path / "checkpoints/iter_0000012")
    shutil.rmtree(path / "checkpoints/iter_0000008")
    assert main(["train", *args, "--lr", "0.25", "--exit-interval", "8"]) == 75  # from step 4: what came later goes
    folder = RunFolder(path)
    assert [(entry["step"], entry.get("changed")) for entry in folder.history.entries] == [
        (0, None),
        (4, {"lr": [0.01, 0.25]}),
    ]
    assert folder.settings_at(3)["lr"] == 0.01
    assert folder.settings_at(4)["lr"] == 0.25
    (path / "config_history.yaml").unlink()
    folder = RunFolder(path)
    assert folder.settings_at(4)["lr"] == 0.25
    assert folder.changes({"lr": 0.5}, 4, {}) == {"lr": [0.25, 0.5]}


def test_the_loss_may_change_and_the_cap_of_the_logits_may_not(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that is older than these settings: neither its facts nor its config.yaml knows them."""
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], RunFolder(tmp_path / "run")
    shutil.copytree(trained[1], folder.path)
    assert "final_logit_softcapping" not in json.loads((folder.path / "journal/meta.json").read_text())["model"]
    first, *later = folder.history.entries
    for name in ("final_logit_softcapping", "z_loss_coeff", "label_smoothing"):
        del first["settings"][name]
    (folder.path / "config_history.yaml").write_text(yaml.safe_dump([first, *later]))
    (folder.path / "config.yaml").write_text(yaml.safe_dump(first["settings"]))
    assert "--final-logit-softcapping 30.0, the run has none" in refusal(
        [*args, "--final-logit-softcapping", "30"], capsys
    )
    tune = [*args, "--load", str(folder.path), "--finetune", "--save", str(tmp_path / "tuned")]
    tune += ["--final-logit-softcapping", "30", "--exit-interval", "1"]
    assert "--final-logit-softcapping 30.0, the run has none" in refusal(tune, capsys)
    assert main(["train", *tune, "--finetune-change", "final_logit_softcapping"]) == 75
    capsys.readouterr()
    assert main(["train", *args, "--exit-interval", "9", "--z-loss-coeff", "0.01", "--label-smoothing", "0.1"]) == 75
    assert "--z-loss-coeff 0.0 -> 0.01, --label-smoothing 0.0 -> 0.1" in capsys.readouterr().out
    after = RunFolder(folder.path)
    assert (after.settings_at(7).get("z_loss_coeff"), after.settings_at(8)["z_loss_coeff"]) == (None, 0.01)


def test_a_setting_that_the_version_before_did_not_have_was_its_default(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, path = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], path)
    history = yaml.safe_load((path / "config_history.yaml").read_text())
    for name in ("finetune_change", "eval_iters"):
        del history[0]["settings"][name]
    (path / "config_history.yaml").write_text(yaml.safe_dump(history))
    assert main(["train", *args, "--exit-interval", "8", "--eval-iters", "7"]) == 0
    assert "settings that change from step 8 on: --eval-iters 100 -> 7\n" in capsys.readouterr().out


def test_a_finished_run_stays_as_it_is(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*tiny_args, *FLAGS]
    assert main(["train", *args]) == 0
    before = content(tmp_path / "run")
    assert main(["train", *args, "--lr", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "these settings have no effect any more: --lr 0.01 -> 0.5" in out
    assert content(tmp_path / "run") == before


def test_a_run_without_a_checkpoint_says_that_it_starts_anew(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    shutil.rmtree(folder / "checkpoints")
    before = content(folder)
    assert "--seed 5, the run has 1234" in refusal([*args, "--seed", "5"], capsys)
    assert content(folder) == before
    assert main(["train", *args, "--exit-interval", "2"]) == 75
    out = capsys.readouterr().out
    assert "stopped before its first checkpoint and starts anew; the 64 losses in its journal" in out
    shutil.rmtree(folder / "checkpoints")
    for path in (folder / "journal").glob("phase_*"):
        path.unlink()  # nothing was trained: another run may begin here
    assert main(["train", *args, "--exit-interval", "2", "--seed", "5"]) == 75
    assert "losses" not in capsys.readouterr().out.split("phase 0")[0]
    assert json.loads((folder / "journal/meta.json").read_text())["seed"] == 5


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


COMMANDS = ("evaluate --run", "convert to-hf --output hf --run", "inspect --hardest 1", "report")


def test_a_run_of_another_version_is_refused_and_one_without_a_version_is_read(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    shutil.copytree(trained[1], folder)
    monkeypatch.chdir(tmp_path)
    tuned = [*args, "--load", str(folder), "--finetune", "--save", str(tmp_path / "tuned")]
    for text, reason in (
        ('{"format": 2, "parent": "x"}', "run.json: format 2: this version of megatron_lfr reads format 1"),
        ("[1]", "run.json: not the description of a run"),
        ("[" * 100_000, "run.json: not the description of a run"),
    ):
        (folder / "run.json").write_text(text)
        before = content(tmp_path)
        for command in (["train", *args], ["train", *tuned], *([*words.split(), str(folder)] for words in COMMANDS)):
            assert main(command) == 2, command
            assert reason in capsys.readouterr().err, command
        assert content(tmp_path) == before
    (folder / "run.json").unlink()  # as runs were before it was written
    for words in COMMANDS:
        assert main([*words.split(), str(folder)]) == 0
    assert main(["train", *args, "--exit-interval", "9"]) == 75
    assert json.loads((folder / "run.json").read_text()) == {"format": 1}


def test_a_checkpoint_without_a_curriculum_is_no_run(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, folder = [*trained[0], "--save", str(tmp_path / "run")], tmp_path / "run"
    from megatron_lfr.checkpoint import CheckpointStore

    CheckpointStore(folder / "checkpoints", keep=None).save(0, {}, {"source": "convert from-hf"})
    before = content(folder)
    assert "holds only weights, no run. Start a run from them with --load" in refusal(args, capsys)
    assert content(folder) == before


def test_paths_are_compared_as_places(
    trained: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, folder = trained
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    for load in (f"{folder}/", str(tmp_path / "link"), "run", f"../{folder.parent.name}/run/."):
        parse_run_config([*args, "--load", load])[0].checkpoint.validate()  # the same folder: goes on with the run
        assert "must be another folder" in refusal([*args, "--load", load, "--finetune"], capsys)


def test_relative_paths_are_found_from_elsewhere(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    for prefix in corpus:
        for suffix in (".bin", ".idx"):
            shutil.copy(prefix + suffix, home / "data")
    names = [f"data/{Path(prefix).name}" for prefix in corpus]
    (home / "blend.txt").write_text(f"1 {names[0]} 2 {names[1]}")
    rest = tiny_flags(corpus)[3:]
    monkeypatch.chdir(home)
    assert main(["train", *rest, *FLAGS, "--exit-interval", "2", "--data-path", *names, "--save", "plain"]) == 75
    args = [*rest, *FLAGS, "--exit-interval", "2", "--data-args-path", "blend.txt", "--save", "blend"]
    assert main(["train", *args]) == 75
    for folder in (tmp_path, home):
        monkeypatch.chdir(folder)
        for name in ("plain", "blend"):
            assert main(["evaluate", "--run", str(home / name)]) == 0
            assert main(["inspect", str(home / name), "--hardest", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    (home / "data").rename(tmp_path / "data")  # moved, and now found from the present folder
    assert main(["inspect", str(home / "plain"), "--hardest", "1"]) == 0
    (tmp_path / "data").rename(tmp_path / "gone")
    capsys.readouterr()
    assert main(["inspect", str(home / "plain"), "--hardest", "1"]) == 2
    assert f"--data-path {home}/{names[0]}" in capsys.readouterr().err
    assert f"{names[0]}.idx: no such file, looked for from {tmp_path}" in refusal(
        [*rest, *FLAGS, "--data-path", *names, "--save", "new"], capsys
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path / "run").hold():
        pass
    assert "no locks on this file system" in capsys.readouterr().err


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, "held")
    with pytest.raises(ValueError, match="held"):
        lock_file(path, "held")
    path.unlink()
    second = lock_file(path, "held")
    assert path.stat().st_ino == os.fstat(second.fileno()).st_ino
    first.close()
    second.close()


def test_another_machines_old_journal_does_not_block_a_new_run(tmp_path: Path) -> None:
    """A machine that is not the first keeps a copy, which is sent anew."""
    nodes: Any = SimpleNamespace(index=1, is_leader=True)
    start = Start(None, None, 0)
    for seed in (1, 2):
        journal = open_journal(RunFolder(tmp_path / "run"), nodes, {"seed": seed}, start, tmp_path / "scratch")
        assert journal is not None
        journal.begin_phase(0)
        journal.close()
    assert json.loads((journal.folder / "meta.json").read_text()) == {"seed": 2}
    assert not (tmp_path / "run").exists()

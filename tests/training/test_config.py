"""Configuration: every wrong setting is refused before work starts, and says which flag and what is legal."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig, parse_run_config, resolve_schedule, run_schedule
from megatron_lfr.config.training import LFRConfig
from megatron_lfr.data.config import parse_blend
from megatron_lfr.lfr import preset
from megatron_lfr.model import MODEL_PRESETS
from megatron_lfr.run_folder.settings import dump_yaml, located
from support.megatron_argument_lists import GPT3_SCRIPT, LLAMA3_SCRIPTS, REFUSED_IN_LLAMA3_SCRIPTS, split_flags


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """stderr of a run that must stop with exit code 2."""
    try:
        code = main(["train", *args])
    except SystemExit as stop:  # tyro leaves in this way
        code = int(stop.code or 0)
    assert code == 2
    return re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-sise", "32"], "hidden-sise"),
        (["--global-batch-size", "10"], "--global-batch-size 10: must be a multiple of --micro-batch-size 4"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0: must be positive"),
        (["--lr", "fast"], "--lr"),
        (["--lr-decay-style", "step"], "--lr-decay-style"),
        (["--seq-length", "4096"], "--seq-length 4096: longer than --max-position-embeddings 16"),
        (["--num-attention-heads", "5"], "--num-attention-heads 5"),
        (["--num-query-groups", "3"], "--num-query-groups 3"),
        (["--z-loss-coeff", "-0.1"], "--z-loss-coeff -0.1: must be at least 0 and below 1"),
        (["--z-loss-coeff", "1"], "--z-loss-coeff 1.0: must be at least 0 and below 1"),
        (["--z-loss-coeff", "nan"], "--z-loss-coeff nan: must be a finite number"),
        (["--label-smoothing", "1.5"], "--label-smoothing 1.5: must be at least 0 and below 1"),
        (["--label-smoothing", "-1"], "--label-smoothing -1.0: must be at least 0"),
        (["--final-logit-softcapping", "0.1"], "--final-logit-softcapping 0.1: must be at least 1, or 0 for none"),
        (["--lfr-schedule", "lfr-v9"], "--lfr-schedule lfr-v9: neither a preset (lfr, lfr-v1"),
        (["--lfr-schedule", "[{kind: learn, duration: -1}]"], "must be a positive number"),
        (["--lfr-schedule", "lfr-v1"], "--train-epochs scales a schedule given in shares"),
        (["--lfr-schedule", "[{kind: learn, duration: 1}]", "--train-epochs", "None", "--train-iters", "7"],
         "--train-iters 7: differs from the schedule's total of"),
        (["--train-epochs", "None"], "give one of --train-iters"),
        (["--train-iters", "-3"], "--train-iters -3: must be positive"),
        (["--split", "90,x,0"], "--split"),
        (["--data-path", "/nowhere/corpus"], "/nowhere/corpus"),
        (["--tokenizer-model", "/nowhere/tokenizer.json"], "/nowhere/tokenizer.json"),
        (["--tokenizer-model", "bytes"], "257 tokens do not fit into --vocab-size 64"),
        (["--eod-mask-loss"], "--eod-mask-loss: needs --tokenizer-model"),
        (["--vocab-size", "None"], "give --tokenizer-model or --vocab-size"),
        (["--vocab-size", "50"], "outside the model's vocabulary of 50"),
        (["--tensor-model-parallel-size", "2"], "1 ranks (WORLD_SIZE) were started: must be a multiple of 2 = "),
        (["--data-parallel-sharding-strategy", "zero3"], "--data-parallel-sharding-strategy"),
        (["--pipeline-schedule", "zero-bubble"], "--pipeline-schedule"),
        (["--cp-comm-type", "p2p"], "--cp-comm-type p2p: refused"),
        (["--load", "/elsewhere"], "a run is continued in its own folder"),
        (["--finetune"], "--finetune: give the run folder to start from"),
        (["--lora-rank", "2"], "--lora-rank: adapts a model; give its run folder with --load, and --finetune"),
        (["--lora-rank", "0"], "--lora-rank 0: must lie between 1 and 16, the fewest inputs or outputs of an adapted"),
        (["--lora-rank", "17"], "--lora-rank 17: must lie between 1 and 16"),
        (["--lora-rank", "17", "--lora-target", "q,o", "--lora-alpha", "-1"], "--lora-alpha -1: must be positive"),
        (["--lora-rank", "2", "--lora-dropout", "0.1"], "--lora-dropout 0.1: must be 0"),
        (["--lora-rank", "2", "--lora-target", "q,head"],
         "--lora-target q,head: 'head' is no module of this model; choose from all, q, k, v, o, gate, up, down"),
        (["--optimizer", "lora-rite"], "--clip-grad 1: must be 0 with --optimizer lora-rite"),
        (["--optimizer", "lora-rite", "--clip-grad", "0"], "lora-rite: updates the adapters of --lora-rank"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--rite-eps", "0"], "--rite-eps must be positive"),
        (["--keep-last", "0"], "--keep-last 0: must be at least 1"),
        (["--save-interval-mins", "-1"], "--save-interval-mins -1.0: must be 0 or more"),
        (["--lfr-schedule", "[{kind: learn, duration: .nan}]"], "duration nan: must be a positive number"),
        (["--lfr-schedule", "[{kind: focus, duration: 1, drop: .nan}]"], "drop nan"),
        (["--lfr-schedule", "[" * 3000], "not YAML: maximum recursion depth"),
        (["--lfr-schedule", "[{kind: learn, duration: 1, duration: 2}]"], "the key 'duration' is there twice"),
        (["--lfr-schedule", "[{kind: learn, duration: 1, sampling: choice}]"],
         "phase 0: sampling choice: has no effect without kind focus"),
        (["--lfr-schedule", "[{kind: learn, duration: 1, weight_cap: 2}]"],
         "phase 0: weight_cap 2: has no effect without weight"),
        (["--lfr-schedule", "[{kind: learn, duration: 1}, {kind: focus, duration: 1, clusters: 4}]"],
         "phase 1: clusters 4: has no effect without selection clusters"),
        (["--lfr-schedule", "[{kind: learn, duration: 1.0e+300}]", "--train-epochs", "None"],
         "--lfr-schedule [{kind: learn, duration: 1.0e+300}]: phase 0: duration 1e+300 epochs"),
        (["--seed", str(2**63)], f"--seed {2**63}: must lie between -2^63 and 2^63"),
        (["--max-position-embeddings", str(2**31)], f"--max-position-embeddings {2**31}: must be below 2^31"),
        (["--distributed-timeout-minutes", "600000"], "--distributed-timeout-minutes 600000: at most 525600"),
        (["--split", "nan,1,0"], "--split nan,1,0"),
        (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
        (["--wandb-project", "x"], "needs the wandb package"),
        (["--model-preset", "2T"], "--model-preset 2T: choose from demo"),
        (["--fp16"], "fp16"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(
    flags: list[str], message: str, tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal([*tiny_args, *flags], capsys)
    if flags != ["--vocab-size", "50"]:  # is seen in the first batch alone
        assert not (tmp_path / "run").exists()


def test_numbers_are_finite(tiny_args: list[str]) -> None:
    """Infinities and NaN are refused, whichever other flag would fail because of them."""
    flags = [
        f"--{field.name.replace('_', '-')}"
        for section in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(getattr(RunConfig(), section.name))
        if "float" in str(field.type)
    ]
    assert len(flags) > 10
    assert {"--lr", "--min-lr", "--train-epochs", "--save-interval-mins"} <= set(flags)
    for flag in flags:
        for value in ("nan", "inf", "-inf"):
            config, _ = parse_run_config([*tiny_args, f"{flag}={value}"])
            with pytest.raises(ValueError, match=f"^{flag} {value}: must be a finite number$"):
                config.validate(1)


SHARDING = "--data-parallel-sharding-strategy"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
PIPELINE_OF_2 = "--pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        *(
            (1, f"{flag} 0", f"{flag} 0: must be at least 1")
            for flag in (
                "--tensor-model-parallel-size",
                "--pipeline-model-parallel-size",
                "--context-parallel-size",
                VIRTUAL,
                "--num-distributed-optimizer-instances",
            )
        ),
        (3, "--tensor-model-parallel-size 2", "3 ranks (WORLD_SIZE) were started: must be a multiple of 2 = --tensor-"),
        (6, "--context-parallel-size 2 --tensor-model-parallel-size 2",
         "6 ranks (WORLD_SIZE) were started: must be a multiple of 4 = --tensor-model-parallel-size 2 x "
         "--pipeline-model-parallel-size 1 x --context-parallel-size 2"),
        (1, f"{VIRTUAL} 1", f"{VIRTUAL} 1: needs --pipeline-model-parallel-size of 2 or more"),
        (2, f"{PIPELINE_OF_2} {VIRTUAL} 1 --pipeline-schedule gpipe",
         f"--pipeline-schedule gpipe with {VIRTUAL}; legal: interleaved"),
        (2, f"{PIPELINE_OF_2} --pipeline-schedule interleaved",
         f"--pipeline-schedule interleaved without {VIRTUAL}; legal: 1f1b, gpipe"),
        (2, f"--use-distributed-optimizer {SHARDING} no_shard",
         f"{SHARDING} no_shard with --use-distributed-optimizer, which stands for optim"),
        *(
            (2, f"{PIPELINE_OF_2} {SHARDING} {strategy}",
             f"{SHARDING} {strategy} with {PIPELINE_OF_2}: a pipeline needs whole weights and gradients until its last "
             "micro-batch; legal: no_shard, optim")
            for strategy in ("optim_grads", "optim_grads_params")
        ),
        (2, "--num-distributed-optimizer-instances 2",
         f"--num-distributed-optimizer-instances 2: needs {SHARDING} optim, optim_grads or optim_grads_params"),
        (4, "--num-distributed-optimizer-instances 3 --use-distributed-optimizer",
         "--num-distributed-optimizer-instances 3: must divide the 4 data-parallel ranks"),
        (4, "--num-distributed-optimizer-instances 4 --use-distributed-optimizer --context-parallel-size 2",
         "--num-distributed-optimizer-instances 4: must divide the 2 data-parallel ranks"),
        (3, "--pipeline-model-parallel-size 3",
         "--pipeline-model-parallel-size 3: 3 stages for --num-layers 2; every stage needs a layer"),
        (2, f"--num-layers 3 {PIPELINE_OF_2} {VIRTUAL} 1", f"{PIPELINE_OF_2}: 4 stages for --num-layers 3"),
        (2, f"{PIPELINE_OF_2} --global-batch-size 4",
         "--pipeline-schedule 1f1b: 1 micro-batches a step on each data-parallel rank; must be at least the 2 stages. "
         "Raise --global-batch-size or lower --micro-batch-size"),
        (4, PIPELINE_OF_2, "--pipeline-schedule 1f1b: 1 micro-batches a step on each data-parallel rank"),
        (2, f"--num-layers 4 {PIPELINE_OF_2} {VIRTUAL} 1 --micro-batch-size 1 --global-batch-size 5",
         "--pipeline-schedule interleaved: 5 micro-batches a step on each data-parallel rank; must be below 4 or "),
        (2, "--context-parallel-size 2 --seq-length 14",
         "--seq-length 14: must be a multiple of 2 x --context-parallel-size 2"),
        (2, "--sequence-parallel --tensor-model-parallel-size 2 --micro-batch-size 1 --seq-length 15 "
         "--make-vocab-size-divisible-by 2",
         "--sequence-parallel: the 15 tokens of a micro-batch must be a multiple of --tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2",
         "--make-vocab-size-divisible-by 1: must be a multiple of --tensor-model-parallel-size 2"),
        (4, "", "--global-batch-size 8: must be a multiple of --micro-batch-size 4 x 4 data-parallel ranks = 16"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(world_size: int, flags: str, message: str, tiny_args: list[str]) -> None:
    config, _ = parse_run_config([*tiny_args, *flags.split()])
    with pytest.raises(ValueError, match=re.escape(message)):
        config.validate(world_size)


@pytest.mark.parametrize(
    ("world_size", "flags", "sharding", "schedule", "stages", "data_parallel_size"),
    [
        (1, "--sequence-parallel", "no_shard", "1f1b", 1, 1),
        (2, "--use-distributed-optimizer", "optim", "1f1b", 1, 2),
        (2, f"--use-distributed-optimizer {SHARDING} optim_grads_params", "optim_grads_params", "1f1b", 1, 2),
        (4, f"--context-parallel-size 2 {SHARDING} optim_grads --num-distributed-optimizer-instances 2",
         "optim_grads", "1f1b", 1, 2),
        (8, f"{PIPELINE_OF_2} --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel {SHARDING} "
         "optim --make-vocab-size-divisible-by 2", "optim", "1f1b", 2, 1),
        (2, f"{PIPELINE_OF_2} --pipeline-schedule gpipe --global-batch-size 4", "no_shard", "gpipe", 2, 1),
        (2, f"{PIPELINE_OF_2} {VIRTUAL} 1 --num-layers 4", "no_shard", "interleaved", 4, 1),
        (2, f"{PIPELINE_OF_2} {VIRTUAL} 2 --num-layers 10", "no_shard", "interleaved", 6, 1),
        (2, f"{PIPELINE_OF_2} {VIRTUAL} 1 --num-layers 4 --global-batch-size 4", "no_shard", "interleaved", 4, 1),
    ],
)  # fmt: skip
def test_layouts_that_fit(
    world_size: int,
    flags: str,
    sharding: str,
    schedule: str,
    stages: int,
    data_parallel_size: int,
    tiny_args: list[str],
) -> None:
    config, _ = parse_run_config([*tiny_args, *flags.split()])
    config.validate(world_size)
    parallel = config.parallel
    assert (parallel.sharding, parallel.schedule) == (sharding, schedule)
    assert parallel.num_stages(config.model.num_layers) == stages
    assert parallel.data_parallel_size(world_size) == data_parallel_size


def test_save_is_required(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--save: give the run folder" in refusal(tiny_args[:-2], capsys)


def copy_corpus(prefix: str, folder: Path) -> Path:
    target = folder / "copy_text_document"
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, str(target) + suffix)
    return target


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_corpora_are_named(
    suffix: str,
    damage: str,
    corpus: list[str],
    tiny_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = copy_corpus(corpus[0], tmp_path)
    path = Path(str(prefix) + suffix)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert str(path) in refusal([*tiny_args, "--data-path", str(prefix)], capsys)


def test_a_corpus_shorter_than_a_block_is_refused(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seq-length", "100000", "--max-position-embeddings", "100000"]
    message = refusal([*tiny_args, *flags], capsys)
    assert "toy_easy_text_document" in message
    assert "100000" in message


def test_a_disk_without_room_is_refused(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    message = refusal(tiny_args, capsys)
    assert "GB free" in message
    assert "--keep-last 3" in message


def test_two_processes_cannot_share_a_run_folder(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run/lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in refusal(tiny_args, capsys)


def test_a_file_is_read_first_and_flags_go_over_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_preset: demo\nlr: 1e-3\nmicro-batch-size: 4\nbf16: true\ndata_path: [a, b]\n"
        "lfr_schedule:\n- {kind: learn, duration: 2}\n- {kind: review, duration: 1}\n"
    )
    config, _ = parse_run_config(["--config", str(path), "--micro-batch-size", "8"])
    assert config.optimizer.lr == 1e-3
    assert config.training.micro_batch_size == 8
    assert config.training.bf16
    assert config.data.data_path == ["a", "b"]
    assert config.model.num_layers == parse_run_config(["--model-preset", "demo"])[0].model.num_layers
    schedule = resolve_schedule(config.lfr.lfr_schedule)
    assert [phase.duration for phase in schedule.phases] == [2, 1]
    config, _ = parse_run_config(["--config", str(path), "--no-bf16", "--lfr-schedule", "lfr"])
    assert not config.training.bf16
    assert resolve_schedule(config.lfr.lfr_schedule) == preset("lfr")


def test_a_schedule_may_be_longer_than_the_name_of_a_file(tmp_path: Path) -> None:
    phases = [{"kind": "learn", "duration": 0.1, "unit": "share", "weight": "file:weight"} for _ in range(10)]
    settings = {"lfr_schedule": dump_yaml(phases), "data_path": ["a"]}
    assert located(settings, tmp_path)["lfr_schedule"] == settings["lfr_schedule"]
    flow = str(phases)
    assert len(resolve_schedule(flow).phases) == 10
    with pytest.raises(ValueError, match=r"neither a preset .* nor a file"):
        resolve_schedule("no-such-preset" * 30)


def test_an_array_named_weight_weighs_every_phase_of_a_preset() -> None:
    def config(schedule: str, *names: str) -> LFRConfig:
        return LFRConfig(lfr_schedule=schedule, lfr_scores=[f"{name}=x.npy" for name in names])

    plain, weighted = (run_schedule(config("lfr", *names)) for names in ((), ("other", "weight")))
    assert plain == run_schedule(config("lfr", "other")) == preset("lfr")
    assert [phase.weight for phase in weighted.phases] == ["file:weight"] * len(plain.phases)
    assert {phase.guard for phase in weighted.phases if phase.kind == "focus"} == {"file:weight"}
    unweighted = [dataclasses.replace(phase, weight="none", guard="none") for phase in weighted.phases]
    assert unweighted == list(plain.phases)
    listed = "[{kind: learn, duration: 1}]"
    assert run_schedule(config(listed, "weight")) == resolve_schedule(listed)
    with pytest.raises(ValueError, match="weighs every phase of --lfr-schedule lfr-v1: phase unit passes"):
        run_schedule(config("lfr-v1", "weight"))


def test_the_effective_configuration_is_a_configuration_file(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_args, "--print-config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    again, _ = parse_run_config(["--config", str(path)])
    assert again == parse_run_config([*tiny_args, "--print-config"])[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hidden_sise: 3", "unknown key 'hidden_sise'; did you mean hidden_size"),
        ("- 1", "expected a mapping"),
        ("a: [", "not YAML"),
        ("lr: fast", "bad.yaml: --lr: could not convert string to float: 'fast'"),
        ("lr_decay_style: step", "bad.yaml: invalid choice 'step' for argument '--lr-decay-style'. Expected one of ("),
        ("seq_length: [1, 2]", "seq_length: takes one value, not a list, got [1, 2]"),
        ("seq-length:", "seq-length: has no value; leave the key out for the default"),
        ("lr: {a: 1}", "lr: takes a value, not a mapping, got {'a': 1}"),
        ("bf16: 3", "bf16: expected true or false, got 3"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_bad_configuration_files_are_named(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    text = refusal(["--config", str(path)], capsys)
    assert message in text
    assert "bad.yaml" in text
    assert "nofile.yaml" in refusal(["--config", str(tmp_path / "nofile.yaml")], capsys)


def test_schedules_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml.safe_dump(preset("lfr-v1").to_dicts()))
    assert resolve_schedule(str(path)) == preset("lfr-v1")
    path.write_text("kind: learn")
    with pytest.raises(ValueError, match="expected a list of phases"):
        resolve_schedule(str(path))


@pytest.mark.parametrize("name", LLAMA3_SCRIPTS)
def test_megatrons_own_llama3_scripts(name: str) -> None:
    """Every flag of the script is honoured, accepted or refused with its reason; without the refused ones it parses."""
    groups = split_flags(LLAMA3_SCRIPTS[name])
    refused = REFUSED_IN_LLAMA3_SCRIPTS[name]
    kept = [word for group in groups if group[0] not in refused for word in group]
    config, notes = parse_run_config(kept)
    for group in groups:
        if group[0] in refused:
            with pytest.raises(ValueError, match=f"{group[0]}.*: "):
                parse_run_config([*kept, *group])
    honoured = {f"--{key.replace('_', '-')}": value for key, value in config.to_flat().items()}
    noted = " ".join(notes)
    for flag, *values in (group for group in groups if group[0] not in refused):
        if flag not in honoured:
            assert flag in noted
        elif values and isinstance(honoured[flag], (int, float)) and not isinstance(honoured[flag], bool):
            assert honoured[flag] == float(values[0])
        elif isinstance(honoured[flag], list):
            assert [str(value) for value in honoured[flag]] == values
        elif values and honoured[flag] != values[0]:  # Megatron's name for one of our values
            assert f"{flag} {values[0]}: accepted as {honoured[flag]}" in noted
        elif not values:
            assert honoured[flag] is True


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["0.3", "a", "b"], "before every prefix or before none"),
        (["0.3", "a", "b", "c"], "before every prefix or before none"),
        (["a", "0.3", "b", "0.7"], "before every prefix or before none"),
        (["1", "2"], "write a prefix that is a number as ./7"),
        (["0.3", "a", "0", "b"], "--data-path 0: a weight must be a positive number"),
        (["-1", "a", "inf", "b"], "--data-path -1: a weight must be a positive number"),
        (["nan", "a"], "--data-path nan: a weight must be a positive number"),
    ],
)
def test_bad_blends(words: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        parse_blend(words, "--data-path")


def test_blends() -> None:
    assert parse_blend(["30", "a", "7e1", "./7"], "--data-path") == (["a", "./7"], [30.0, 70.0])
    assert parse_blend(["a", "b", "c"], "--data-path") == (["a", "b", "c"], None)


def test_bad_blend_files(tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blend"
    with_file = ["--data-args-path", str(path)]
    assert "give --data-path or --data-args-path, not both" in refusal([*tiny_args, *with_file], capsys)
    rest = tiny_args[tiny_args.index("--split") :]
    assert str(path) in refusal([*with_file, *rest], capsys)
    path.write_bytes(b"\xff\xfe")
    assert f"--data-args-path {path}: not a text file" in refusal([*with_file, *rest], capsys)
    path.write_text("")
    assert "give at least one prefix" in refusal([*with_file, *rest], capsys)
    path.write_text("1 a b")
    assert f"--data-args-path {path}: give a weight" in refusal([*with_file, *rest], capsys)


def test_megatrons_gpt3_script_is_honoured_but_for_what_is_refused_by_name() -> None:
    with pytest.raises(ValueError) as caught:
        parse_run_config(GPT3_SCRIPT)
    assert [line.partition(": refused")[0] for line in str(caught.value).splitlines()] == ["--fp16"]
    assert str(caught.value).endswith("instead: --bf16")
    words = [word for group in split_flags(GPT3_SCRIPT) if group[0] != "--fp16" for word in group]
    config, notes = parse_run_config([*words, "--bf16", "--model-preset", "gpt2", "--vocab-size", "50257"])
    assert not notes
    assert config.model.num_parameters() == pytest.approx(175e9, rel=0.01)
    assert config.model == dataclasses.replace(MODEL_PRESETS["gpt3-175B"], vocab_size=50257, init_method_std=0.006)
    # Every flag's value is where it should be: none is lost on the way.
    spelled = {"data_path": ["data/my_text_document"], "rampup_batch_size": [16, 16, 5859375]}
    given = config.to_flat()
    for flag, *values in split_flags(words):
        name = flag[2:].replace("-", "_")
        if name in ("vocab_file", "merge_file"):
            assert values[0] in given["tokenizer_model"].split(",")
        elif name in spelled:
            assert given[name] == spelled[name]
        else:
            assert str(given[name]) == values[0] or float(given[name]) == float(values[0]), flag


def test_tokenizers_two_files_are_named_together_and_alone() -> None:
    files = ["--vocab_file=v.json", "--merge-file", "m.txt"]
    assert parse_run_config([*files, "--data-path", "c"])[0].data.tokenizer_model == "v.json,m.txt"
    with pytest.raises(ValueError, match=r"^--vocab-file and --merge-file: give both"):
        parse_run_config(files[:1])
    with pytest.raises(ValueError, match=r"^give --tokenizer-model, or --vocab-file and --merge-file, not both$"):
        parse_run_config([*files, "--tokenizer-model", "bytes"])


def test_heads_that_do_not_divide_name_the_sizes_that_do() -> None:
    config = MODEL_PRESETS["gpt2-1.5B"]
    with pytest.raises(ValueError, match=r"^--num-query-groups 25: .*-size 2; legal sizes: 1, 5, 25$"):
        config.validate(2)
    dataclasses.replace(config, make_vocab_size_divisible_by=640).validate(5)

"""Megatron's flags that are no settings: what passes, what ends the program, what stays untouched."""

from __future__ import annotations

import re

import megatron_flags_page
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.config import RunConfig
from megatron_lfr.megatron_flags import ACCEPTED, NEEDS, REFUSED, RENAMED, TRANSLATED, strip_megatron_flags

VALUE = "7"


def values_for(arity: int | str) -> list[str]:
    return {0: [], 1: [VALUE], "+": [VALUE, VALUE]}[arity]


def test_no_flag_is_in_both_tables_and_names_are_canonical() -> None:
    assert not ACCEPTED.keys() & REFUSED.keys()
    for flag in [*ACCEPTED, *REFUSED]:
        assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", flag), flag


def test_the_page_in_the_documentation_is_made_from_the_table() -> None:
    assert megatron_flags_page.PAGE.read_text("utf-8") == megatron_flags_page.render()


def test_no_setting_is_in_a_table() -> None:
    """A flag in a table would never reach its setting."""
    settings = {f"--{name.replace('_', '-')}" for name in RunConfig().to_flat()}
    assert "--sequence-parallel" in settings
    assert not settings & (ACCEPTED.keys() | REFUSED.keys())


@pytest.mark.parametrize("flag", ACCEPTED)
def test_an_accepted_flag_leaves_with_its_values_and_a_note(flag: str) -> None:
    spec = ACCEPTED[flag]
    legal = [*spec.legal] if spec.legal else [VALUE]
    for value in legal:
        values = {0: [], 1: [value], "+": [value, value]}[spec.arity]
        needed = [NEEDS[flag]] if flag in NEEDS else []
        rest, notes = strip_megatron_flags(["--before", "1", flag, *values, "--after", *needed])
        assert rest == ["--before", "1", "--after", *needed]
        assert notes == [f"{' '.join([flag, *values])}: accepted, {spec.reason}"]


@pytest.mark.parametrize("flag", [flag for flag, spec in ACCEPTED.items() if spec.legal])
def test_a_value_that_is_not_what_is_done_names_flag_value_and_legal_values(flag: str) -> None:
    with pytest.raises(ValueError) as caught:
        strip_megatron_flags([flag, "something-else"])
    message = str(caught.value)
    assert message.startswith(f"{flag} something-else: refused")
    for legal in ACCEPTED[flag].legal or ():
        assert legal in message


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_gives_its_reason_and_what_to_use(flag: str) -> None:
    spec = REFUSED[flag]
    with pytest.raises(ValueError) as caught:
        strip_megatron_flags(["--lr", "1e-3", flag, *values_for(spec.arity), "--bf16"])
    assert str(caught.value) == f"{flag}: refused: {spec.reason}; instead: {spec.instead}"


@pytest.mark.parametrize("flag", [flag for flag, spec in ACCEPTED.items() if spec.arity != 0])
@pytest.mark.parametrize("following", [[], ["--bf16"]])
def test_a_missing_value_is_an_error(flag: str, following: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{flag}: needs a value; legal: "):
        strip_megatron_flags([flag, *following])


def test_megatrons_attention_backends_are_auto() -> None:
    for argv in (["--attention-backend", "flash", "--bf16"], ["--attention_backend=fused", "--bf16"]):
        rest, notes = strip_megatron_flags(argv)
        assert rest == ["--attention-backend", "auto", "--bf16"]
        assert len(notes) == 1
        assert notes[0].endswith(": accepted as auto")
    for backend in ("auto", "sdpa", "flex", "unfused"):  # the last is for the parser to refuse, with the legal values
        assert strip_megatron_flags(["--attention-backend", backend]) == (["--attention-backend", backend], [])
    assert strip_megatron_flags(["--attention-backend", "--bf16"])[0] == ["--attention-backend", "--bf16"]
    assert {RENAMED.get(flag, flag) for flag in TRANSLATED} <= {
        f"--{name.replace('_', '-')}" for name in RunConfig().to_flat()
    }


def test_flags_of_megatron_deepspeed_under_our_names() -> None:
    rest, notes = strip_megatron_flags(
        [
            "--num-key-value-heads=4",
            "--checkpoint-activations",
            "--deepspeed-activation-checkpointing",
            "--zero-stage",
            "3",
        ]
    )
    assert rest == [
        *("--num-query-groups", "4", "--recompute-granularity", "full"),
        *("--data-parallel-sharding-strategy", "optim_grads_params"),
    ]
    assert notes[:2] == [
        "--num-key-value-heads 4: accepted as --num-query-groups 4",
        "--checkpoint-activations: accepted as --recompute-granularity full",
    ]
    rotary = ["--use-rotary-position-embeddings", "--no-position-embedding", "--normalization", "rmsnorm"]
    assert strip_megatron_flags(rotary)[0] == [
        *("--position-embedding-type", "rope", "--position-embedding-type", "rope", "--normalization", "RMSNorm")
    ]
    with pytest.raises(ValueError, match=r"^--deepspeed-activation-checkpointing: needs --recompute-granularity$"):
        strip_megatron_flags(["--deepspeed-activation-checkpointing"])


def test_a_value_for_a_flag_that_takes_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--log-throughput: takes no value, got 'true'"):
        strip_megatron_flags(["--log-throughput=true"])


def test_a_flag_of_no_value_leaves_the_next_word_alone() -> None:
    assert strip_megatron_flags(["--log-throughput", "word"])[0] == ["word"]


def test_equals_signs_and_underscores() -> None:
    argv = ["--rope_type=rope", "--rotary_percent", "1", "--data-cache-path=a=b", "--log_throughput"]
    rest, notes = strip_megatron_flags(argv)
    assert rest == []
    assert [note.partition(":")[0] for note in notes] == [
        "--rope-type rope",
        "--rotary-percent 1",
        "--data-cache-path a=b",
        "--log-throughput",
    ]
    with pytest.raises(ValueError, match=r"^--fp8-format: refused"):
        strip_megatron_flags(["--fp8_format=hybrid"])
    assert strip_megatron_flags(["--use-dist_ckpt"])[0] == []


@pytest.mark.parametrize("one", ["1", "1.0", "1.", "1e0", "10e-1"])
def test_numbers_compare_by_value(one: str) -> None:
    assert strip_megatron_flags(["--rotary-percent", one, "--x"])[0] == ["--x"]


@pytest.mark.parametrize("value", ["0.1", "-1", "nan", "one", ""])
def test_numbers_that_differ_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"^--rotary-percent .*legal: 1.0"):
        strip_megatron_flags(["--rotary-percent", value])


def test_negative_values_are_values() -> None:
    assert strip_megatron_flags(["--x", "-1", "--train-sync-interval", "-1", "-2"])[0] == ["--x", "-1", "-2"]


def test_a_list_goes_up_to_the_next_flag() -> None:
    argv = ["--cp-comm-type", "all_gather", "all_gather", "--data-path", "a", "b"]
    assert strip_megatron_flags(argv)[0] == ["--data-path", "a", "b"]
    with pytest.raises(ValueError, match=r"^--recompute-modules mlp: refused.*legal: core_attn"):
        strip_megatron_flags(["--recompute-modules", "core_attn", "mlp"])
    with pytest.raises(ValueError, match=r"^--cp-comm-type p2p: refused.*legal: all_gather$"):
        strip_megatron_flags(["--cp-comm-type", "all_gather", "p2p"])


def test_every_problem_is_named_in_one_error() -> None:
    with pytest.raises(ValueError) as caught:
        strip_megatron_flags(
            ["--fp16", "--manual-gc", "--recompute-method", "block", "--step-batch-size-schedule", "0:16"]
        )
    lines = str(caught.value).splitlines()
    assert [line.partition(": refused")[0] for line in lines] == [
        "--fp16",
        "--recompute-method block",
        "--step-batch-size-schedule",
    ]


@given(st.lists(st.sampled_from(["--lr", "--x-y", "--x_y", "--a=b_c", "-1", "1e-3", "--", "-h", "", "a=--swiglu"])))
def test_other_words_pass_untouched(argv: list[str]) -> None:
    assert strip_megatron_flags(argv) == (argv, [])

"""Shapes: checks, sizes, presets."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_lfr.model import MODEL_PRESETS, Decoder, ModelConfig

DEMO = dataclasses.replace(MODEL_PRESETS["demo"], vocab_size=500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "--num-layers 0: must be at least 1; give it, or --model-preset"),
        ({"hidden_size": 0}, "--hidden-size 0"),
        ({"num_attention_heads": 5}, "--num-attention-heads 5: must divide --hidden-size 128"),
        ({"num_query_groups": 3}, "--num-query-groups 3: must divide --num-attention-heads 4"),
        ({"num_query_groups": 0}, "--num-query-groups 0: must be at least 1"),
        ({"kv_channels": 15}, "--kv-channels 15"),
        ({"ffn_hidden_size": -1}, "--ffn-hidden-size -1"),
        ({"vocab_size": 0}, "--vocab-size 0"),
        ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by 0"),
        ({"max_position_embeddings": 0}, "--max-position-embeddings 0"),
        ({"rotary_base": 0.0}, "--rotary-base 0.0: must be positive and finite"),
        ({"rotary_base": float("nan")}, "--rotary-base nan"),
        ({"rope_high_freq_factor": 1.0}, "--rope-low-freq-factor 1.0: must be below --rope-high-freq-factor"),
        ({"norm_epsilon": 0.0}, "--norm-epsilon 0.0"),
        ({"final_logit_softcapping": 0.5}, "--final-logit-softcapping 0.5: must be at least 1, or 0 for none"),
        ({"final_logit_softcapping": -30.0}, "--final-logit-softcapping -30.0"),
        ({"final_logit_softcapping": float("nan")}, "--final-logit-softcapping nan"),
        ({"init_method_std": float("inf")}, "--init-method-std inf"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(DEMO, **change).validate()  # type: ignore[arg-type]


def test_shapes_that_do_not_spread_over_the_ranks_are_refused() -> None:
    DEMO.validate(2)
    with pytest.raises(ValueError, match="--num-query-groups 2: must be a multiple of --tensor-model-parallel-size 4"):
        DEMO.validate(4)
    with pytest.raises(ValueError, match="--ffn-hidden-size 351"):
        dataclasses.replace(DEMO, ffn_hidden_size=351).validate(2)


def test_nothing_given_asks_for_a_preset() -> None:
    with pytest.raises(ValueError, match="--model-preset"):
        ModelConfig().validate()


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"), [(500, 128, 512), (512, 128, 512), (513, 128, 640), (513, 1, 513)]
)
def test_padded_vocabulary(vocab_size: int, multiple: int, rows: int) -> None:
    config = dataclasses.replace(DEMO, vocab_size=vocab_size, make_vocab_size_divisible_by=multiple)
    assert config.padded_vocab_size == rows


def test_padding_that_does_not_spread_over_the_ranks_is_refused() -> None:
    """It has the same rows for every number of ranks."""
    config = dataclasses.replace(DEMO, make_vocab_size_divisible_by=3)
    config.validate(1)
    with pytest.raises(ValueError, match="--make-vocab-size-divisible-by 3: must be a multiple of --tensor-model-"):
        config.validate(2)


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match="--vocab-size"):
        _ = MODEL_PRESETS["demo"].padded_vocab_size


@pytest.mark.parametrize("change", [{}, {"untie_embeddings_and_output_weights": True}, {"kv_channels": 64}])
def test_number_of_parameters(change: dict[str, bool]) -> None:
    config = dataclasses.replace(DEMO, make_vocab_size_divisible_by=1, **change)  # type: ignore[arg-type]
    assert config.num_parameters() == sum(p.numel() for p in Decoder(config, seed=1).parameters())


def test_floating_point_operations() -> None:
    config = dataclasses.replace(DEMO, make_vocab_size_divisible_by=1)
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        Decoder(config, seed=1)(tokens, tokens, torch.full((2, 64), 1 / 128))[0].backward()
    # PyTorch counts the products (CPU attention is unknown to it).
    attention = 6 * 4 * 128 * 65
    assert config.flops_per_token(64) - attention == counter.get_total_flops() / 128


@pytest.mark.parametrize(
    ("name", "vocab_size", "low", "high"),
    [
        ("demo", 2048, 0.95e6, 1.05e6),
        ("120M", 32000, 115e6, 125e6),
        ("300M", 32000, 290e6, 310e6),
        ("500M", 32000, 480e6, 510e6),
        ("1.1B", 32000, 1_100_048_384, 1_100_048_384),  # TinyLlama-1.1B
        ("8B", 128256, 8_030_261_248, 8_030_261_248),  # Llama-3-8B
        ("70B", 128256, 70_553_706_496, 70_553_706_496),  # Llama-3-70B
    ],
)
def test_presets_have_the_size_that_they_say(name: str, vocab_size: int, low: float, high: float) -> None:
    config = dataclasses.replace(MODEL_PRESETS[name], vocab_size=vocab_size)
    config.validate()
    assert low <= config.num_parameters() <= high


def test_default_width_of_the_feed_forward() -> None:
    assert dataclasses.replace(DEMO, ffn_hidden_size=None, hidden_size=4096).ffn_size == 10944

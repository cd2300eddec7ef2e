"""The keys that a config.json may have: those that matter with their legal values, and those that do not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_lfr.huggingface.families import Family

CAP = "final_logit_softcapping"
"""Key of the bound on the logits, as Gemma 2 names it."""

_READ = ("model_type", "architectures", "tie_word_embeddings", "pretraining_tp", CAP, "eos_token_id")
"""Keys that the conversion reads for every family."""

_LEGAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
"""Keys of what transformers' models can do and ours cannot, with their only legal values, where a family does not read
them."""

_ORDINARY = (
    "_name_or_path",
    "bos_token_id",
    "pad_token_id",
    "unk_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
)
"""Keys that transformers itself writes for every model, and that do not concern its logits."""

# fmt: off
GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)
"""Keys of how a model generates, which transformers reads where there is no generation_config.json."""
_HARMLESS = (
    # What other programs leave there.
    "is_llama_config", "max_sequence_length", "model_max_length", "transformers.js_config", "unsloth_version",
    "unsloth_fixed", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "_flash_attn_2_enabled", "use_flash_attention", "neuron", "model_name",
    # What earlier versions of transformers wrote for every model: generation, heads of other tasks, export.
    *GENERATION, "output_scores", "return_dict_in_generate", "remove_invalid_values", "prefix", "sep_token_id",
    "decoder_start_token_id", "task_specific_params", "finetuning_task", "tokenizer_class", "tf_legacy_loss",
    "torchscript", "use_bfloat16", "tie_encoder_decoder", "cross_attention_hidden_size", "is_decoder",
    # GPT-2's, of heads of other tasks.
    "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout",
)
# fmt: on
"""Keys that do not change the logits, whatever their value."""

_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
"""Keys of dropout in training, which changes no logit of a trained model."""

_HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "pruned_heads": ({}, None),
    "hidden_dropout": (0,),
}
"""Keys that do not change the logits with these values, which switch a feature off."""


def check_keys(settings: Mapping[str, Any], family: Family, allowed: Collection[str] = ()) -> list[str]:
    """Check the keys of a config.json, except the values of those that the conversion reads. Returns notes on keys that
    are ignored.

    `allowed`: keys that are accepted although they are unknown. Raises ValueError that names a key that is unknown and
    not allowed, or a value that our model does not support.
    """
    read, harmless, dropout = {*_READ, *family.read_keys()}, [], []
    legal = {**_LEGAL, **family.legal}
    for key, value in settings.items():
        if key in read:
            continue
        if key in legal:
            if value not in legal[key]:
                raise ValueError(f"{key} {value!r} is not supported; only {legal[key][0]!r} is")
        elif key in _HARMLESS or value in _HARMLESS_VALUES.get(key, ()):
            harmless.append(key)
        elif key in _DROPOUT:
            dropout += [f"{key} {value}"] if value else []
        elif key not in _ORDINARY and key not in allowed:
            known = f"; it changes nothing only as {_HARMLESS_VALUES[key][0]!r}" if key in _HARMLESS_VALUES else ""
            raise ValueError(
                f"unknown key {key!r} ({value!r:.60}){known}; if it does not change what the model computes, let it "
                f"through with --allow-config-key {key}"
            )
    notes = [f"{', '.join(harmless)}: left out, as they do not change the logits"] if harmless else []
    if dropout:
        notes.append(
            f"{', '.join(dropout)}: left out, as it does not change the logits; train with --attention-dropout and "
            "--hidden-dropout"
        )
    handled = (*read, *_ORDINARY, *legal, *harmless, *_DROPOUT)
    let_through = [key for key in settings if key in allowed and key not in handled]
    if let_through:
        notes.append(f"{', '.join(let_through)}: let through by --allow-config-key and not converted")
    if unused := [key for key in allowed if key not in settings]:
        notes.append(f"{', '.join(unused)}: --allow-config-key names it, but it is not there")
    return notes

"""The identity of a run: the facts that its checkpoints and its journal store, and that a command must agree with.

Facts are everything that changes what the weights compute, what the labels are, or what a block id means: with other
facts, a resumed run, an evaluation or a conversion would silently go wrong. Everything else, for instance the settings
of the optimizer and of the loss, may change when a run continues. A new setting of the model or of the documents is a
fact unless it is excluded here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from megatron_lfr.checkpoint import Checkpoint, CheckpointStore
from megatron_lfr.config import RunConfig
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.block_values import BlockValues, digests_of
from megatron_lfr.data.corpus.blocks import BlockDataset, parse_split
from megatron_lfr.data.corpus.tokenizer import Tokenizer, end_of_document
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.identity import FORMAT, check_format, describe_segments, read_plan
from megatron_lfr.model import ModelConfig
from megatron_lfr.run_folder import RunFolder

Facts = Mapping[str, Any]

_MODEL_MAY_CHANGE = ("max_position_embeddings", "init_method_std")
"""Fields of ModelConfig that do not change what the weights compute."""
_ROPE_SCALING = (
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
)
_ADDED: dict[str, dict[str, Any]] = {
    "model": {
        "final_logit_softcapping": 0.0,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_after_sublayers": False,
        "qk_layernorm": False,
        "qk_layernorm_across_heads": False,
        "disable_bias_linear": True,
        "add_qkv_bias": False,
        "add_attention_output_bias": False,
        "add_mlp_bias": False,
        "sliding_window": None,
        "position_embedding_type": "rope",
        "rope_scaling_type": "llama3",
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_truncate": True,
        "yarn_attention_factor": None,
    }
}
"""Facts added after the first runs, by section, with the values that mean what runs did before. They are stored only
where they have another value, so that the facts of a run that does not use them stay the same."""
_NOT_OF_DOCUMENTS = (
    *("data_path", "data_args_path", "split", "valid_data_path", "seq_length"),
    *("tokenizer_model", "eod_token", "prefetch"),
)
"""Fields of DataConfig that other facts cover, or that may change."""

_FLAGS = {
    "fingerprint": "tokenizer_model",
    "eod": "eod_token",
    "corpus": "data_path",
    "schedule": "lfr_schedule",
    "weights": "data_path",
    "focus_scope": "lfr_focus_scope",
    "scopes": "lfr_schedule",
    "arrays": "lfr_scores",
    "base": "load",
}
"""The names of settings whose facts have another name, by the name of the fact."""

_LENGTHS = ("train_iters", "train_samples", "train_epochs")


def run_identity(
    config: RunConfig,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    corpus: BlockDataset,
    plan: Plan,
    arrays: Sequence[Mapping[str, BlockValues]],
) -> dict[str, Any]:
    """Return the facts of a run, as JSON values, from its configuration and the parts that were built from it. arrays:
    the files of --lfr-scores of each segment."""
    facts = {
        "format": FORMAT,
        "seed": config.training.seed,
        "init_method_std": config.model.init_method_std,
        "seq_length": config.data.seq_length,
        "split": [str(share) for share in parse_split(config.data.split)],
        **model_identity(config, model, tokenizer),
        "corpus": corpus.digests(),
        "segments": describe_segments(plan, digests_of(arrays)),
        **lora_facts(config, model),
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(facts))
    return as_stored


def model_identity(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the facts that a model's weights depend on, whatever it is used for: model, tokenizer and documents."""
    return {
        "model": _model_facts(model),
        "tokenizer": {
            "fingerprint": None if tokenizer is None else tokenizer.fingerprint,
            "eod": end_of_document(tokenizer),
        },
        "documents": _without(config.data, _NOT_OF_DOCUMENTS),
    }


def weights_identity(model: ModelConfig, tokenizer: str | None) -> dict[str, Any]:
    """Return the facts of weights that were not trained by a run of ours: those of the model, and the fingerprint of
    their tokenizer."""
    return {"format": FORMAT, "model": _model_facts(model), "tokenizer": {"fingerprint": tokenizer}}


def open_base(config: RunConfig, facts: Facts, group: ProcessGroup | None) -> Checkpoint:
    """Open the weights that a run's adapters were made for, of --load. Collective; ValueError where they are missing,
    or are others."""
    assert config.checkpoint.load is not None
    step, digest = config.checkpoint.ckpt_step, facts["lora"]["base"]
    checkpoint = RunFolder(config.checkpoint.load, "--load").checkpoint(step, group)
    if checkpoint.digest != digest:
        raise ValueError(
            f"--load {config.checkpoint.load}: iteration {checkpoint.iteration} is not the base of these adapters, "
            f"whose digest is {digest[:16]}...; --ckpt-step chooses another iteration"
        )
    return checkpoint


def check_facts(source: Path, stored: Any) -> None:
    """Raise ValueError that names the file, for facts of a run that are not in this version's format."""
    try:
        if not isinstance(stored, Mapping):
            raise ValueError("expected the facts of a run as an object")
        read_plan(stored)
        if not isinstance(stored.get("corpus"), list):
            raise ValueError("corpus: expected a digest for each prefix")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a run records: all but a leave that is given for one command."""
    return {**config.to_flat(), "override_opt_param_scheduler": False}


def facts_before(facts: Facts, segments: int) -> dict[str, Any]:
    """Return the facts of a run as they were with its first `segments` segments, of which there may be more now."""
    kept = facts["segments"][:segments]
    if len(kept) == len(facts["segments"]):
        return dict(facts)
    return {**facts, "corpus": facts["corpus"][: len(kept[-1]["blend"]["starts"]) - 1], "segments": kept}


def check_old_corpora(stored: Sequence[str], digests: Sequence[str]) -> None:
    """Check that a corpus begins with the prefixes that it had, given the digests of both; else ValueError names the
    first that differs."""
    for number, digest in enumerate(stored, 1):
        if number > len(digests):
            raise ValueError(f"--data-path: names {len(digests)} prefixes, the run had {len(stored)} already")
        if digests[number - 1] != digest:
            raise ValueError(
                f"--data-path: prefix {number} of {len(digests)} is not the run's, or has changed; the first "
                f"{len(stored)} must be the run's, in its order"
            )


def check_same_run(folder: Path, stored: Facts, facts: Facts, was: Facts, settings: Facts) -> None:
    """Check that a command continues the run in `folder`; else ValueError names the flags, and both values.

    stored, facts: the facts of the run, and those of the command, which may have more segments. was, settings: the
    settings behind them.
    """
    now = facts_before(facts, len(stored["segments"]))
    differences = _differences(_flat(stored), _flat(now), was, settings)
    if differences:
        raise ValueError(
            f"--save {folder}: the run there was made otherwise: {'; '.join(differences)}. Give the run's own values "
            "to go on with it, or another --save to start a new run"
        )


def check_same_model(
    what: str, checkpoint: Checkpoint, facts: Facts, was: Facts, settings: Facts, may_differ: Collection[str] = ()
) -> None:
    """Check that a checkpoint's weights are used as they were trained; else ValueError begins with `what` and names the
    flags, and both values.

    facts: at least what `model_identity` returns. was, settings: the settings of the run that trained the weights, and
    those behind `facts`. Settings named in `may_differ`, and facts that are unknown on either side, are not compared.
    """
    stored = checkpoint.state.get("identity")
    if stored is None:
        print(f"{checkpoint.folder}: does not say how its weights were trained; the settings are taken on trust")
        return
    if not isinstance(stored, Mapping):
        raise ValueError(f"{checkpoint.folder}: expected the facts of its weights as an object")
    check_format(stored)
    old, new = _of_model(stored), _of_model(facts)
    both = [name for name in new if None not in (old.get(name), new[name]) and _setting(name) not in may_differ]
    differences = _differences({n: old[n] for n in both}, {n: new[n] for n in both}, was, settings)
    if differences:
        raise ValueError(f"{what}: its weights were trained otherwise: {'; '.join(differences)}")


def check_same_adapters(what: str, checkpoint: Checkpoint, facts: Facts, was: Facts, settings: Facts) -> None:
    """Check that a checkpoint holds adapters of the kind and base of a run's; else ValueError begins with `what` and
    names the flags, and both values. was, settings: the settings of the run that trained them, and those behind
    `facts`."""
    stored = checkpoint.state.get("identity")
    if not isinstance(stored, Mapping) or not isinstance(stored.get("lora"), Mapping):
        raise ValueError(f"{what}: holds no adapters; give a run with --lora-rank, or one of convert from-peft")
    check_format(stored)
    differences = _differences(_flat({"lora": stored["lora"]}), _flat({"lora": facts["lora"]}), was, settings)
    if differences:
        raise ValueError(f"{what}: its adapters are others: {'; '.join(differences)}")


def check_trained_with(
    folder: RunFolder, checkpoint: Checkpoint, config: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Check that a run's checkpoint was trained with the settings of its config.yaml, as a command has changed them;
    else ValueError names the flags, and both values."""
    was = folder.settings_at(checkpoint.iteration)
    what = f"--run {folder.path}: checkpoint {checkpoint.iteration}"
    check_same_model(what, checkpoint, model_identity(config, model, tokenizer), was, config.to_flat())


def comparable_settings(facts: Facts) -> list[str]:
    """Return the names of the settings that `check_same_model` compares."""
    return [_setting(name) for name in _of_model(facts)]


def describe_changes(changes: Mapping[str, Sequence[Any]]) -> str:
    """Describe settings that changed ([before, after]), by their flags."""
    return ", ".join(f"{_flag(name)} {_shown(before)} -> {_shown(after)}" for name, (before, after) in changes.items())


def lora_facts(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """Return what the adapters of a run are, and the digest of their base; nothing for a run without adapters."""
    lora, checkpoint = config.lora, config.checkpoint
    if lora.lora_rank is None:
        return {}
    if not checkpoint.finetune or checkpoint.load is None:
        raise ValueError("--lora-rank: adapts a model; give its run folder with --load, and --finetune")
    store = CheckpointStore(RunFolder(checkpoint.load, "--load").checkpoint_folder, keep=None)
    targets = lora.targets(model)
    base = store.digest(checkpoint.ckpt_step)
    return {"lora": {"lora_rank": lora.lora_rank, "lora_alpha": lora.lora_alpha, "lora_target": targets, "base": base}}


def _of_model(facts: Facts) -> dict[str, Any]:
    return _flat({name: facts.get(name, {}) for name in ("model", "tokenizer", "documents")})


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    facts = _without(model.canonical(), _MODEL_MAY_CHANGE)
    if not model.use_rope_scaling:
        facts |= dict.fromkeys(_ROPE_SCALING)
    if not model.has_rope:  # an embedding for each position
        facts["max_position_embeddings"] = model.max_position_embeddings
    return {name: value for name, value in facts.items() if (name, value) not in _ADDED["model"].items()}


def _without(config: ModelConfig | DataConfig, names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in names}


def _flat(facts: Facts) -> dict[str, Any]:
    """Return facts by their names; those of sections and of the last segment are named "section.name", and those
    of the segments before it "segments"."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if name == "segments":
            schedule = [
                {key: fact for key, fact in phase.items() if key != "replay"} for phase in value[-1]["schedule"]
            ]
            replay = [phase.get("replay", 0.0) for phase in value[-1]["schedule"]]
            segment = {**value[-1], **value[-1]["blend"], "schedule": schedule, "replay": replay}
            flat |= {f"segment.{key}": fact for key, fact in segment.items() if key != "blend"}
            flat["segments"] = value[:-1]
        elif isinstance(value, Mapping):
            missing = {key: fact for key, fact in _ADDED.get(name, {}).items() if value and key not in value}
            flat |= {f"{name}.{key}": fact for key, fact in {**value, **missing}.items()}
        else:
            flat[name] = value
    return flat


_FOLLOWS = {
    "model.num_query_groups": ("model.num_attention_heads",),
    "model.kv_channels": ("model.num_attention_heads", "model.hidden_size"),
    "model.ffn_hidden_size": ("model.hidden_size",),
    **{f"model.{name}": ("model.use_rope_scaling",) for name in (*_ROPE_SCALING, "rope_scaling_type")},
    "model.vocab_size": ("tokenizer.fingerprint",),
    **{f"lora.{name}": ("lora.lora_rank",) for name in ("lora_alpha", "lora_target", "base")},
    "tokenizer.eod": ("tokenizer.fingerprint",),
    "corpus": ("seq_length", "split"),
    "segments": ("corpus",),
    "segment.scopes": ("corpus", "segment.schedule"),
    "segment.replay": ("segment.schedule",),
    "segment.blocks": ("seq_length", "split", "corpus"),
    "segment.starts": ("seq_length", "split", "corpus"),
    "segment.arrays": ("seq_length", "split", "corpus", "segment.schedule"),
    "segment.samples": ("seq_length", "split", "corpus", "segment.global_batch_size", "segment.schedule"),
}
"""Facts that follow from others, by the facts they follow from: where those differ, these are not reported."""


def _differences(stored: Facts, facts: Facts, was: Facts, settings: Facts) -> list[str]:
    """Describe each difference by the flag that makes it."""
    names = [name for name in {**facts, **stored} if stored.get(name) != facts.get(name)]
    return [
        _difference(name, stored.get(name), facts.get(name), was, settings)
        for name in names
        if not any(cause in names for cause in _FOLLOWS.get(name, ()))
    ]


def _difference(name: str, old: Any, new: Any, was: Facts, settings: Facts) -> str:
    if name == "segments":
        return "its earlier segments differ"
    if name == "segment.samples":
        return _length_difference(old, new, was, settings)
    if name == "segment.arrays":
        wrong = next(key for key in {**new, **old} if old.get(key) != new.get(key))
        return f"{_flag(_setting(name))} {wrong}: is not the run's file, or has changed since the run began"
    setting = _setting(name)
    flag, before, now = _flag(setting), was.get(setting), settings.get(setting)
    if isinstance(old, int) and isinstance(new, int) and name != "tokenizer.eod":  # facts hold what a default became
        before, now = (fact if given is None else given for fact, given in ((old, before), (new, now)))
    if name == "corpus":
        index = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), None)
        if index is None:
            more = " (megatron-lfr extend appends prefixes)" if len(new) > len(old) else ""
            return f"{flag} names {len(new)} prefixes, the run has {len(old)}{more}"
        return f"{flag}: prefix {index + 1} of {len(new)} is not the run's, or has changed"
    if before != now:
        return f"{flag} {_shown(now)}, the run has {_shown(before)}"
    if setting in ("tokenizer_model", "lfr_schedule", "load"):
        return f"{flag} {_shown(now)} has changed since the run began"
    return f"{flag} {_shown(new)}, the run has {_shown(old)}"


def _length_difference(old: Sequence[int], new: Sequence[int], was: Facts, settings: Facts) -> str:
    given = [next((n for n in _LENGTHS if one.get(n) is not None), None) for one in (settings, was)]
    now, before = (
        f"{_flag(name)} {_shown(one[name])}" if name else f"the schedule's {sum(samples)} blocks"
        for name, one, samples in zip(given, (settings, was), (new, old), strict=True)
    )
    if given[0] == given[1] and given[0] is not None:
        before = _shown(was[given[0]])
    return (
        f"{now}, the run has {before} (a run that has begun keeps its length, as its phases are laid out over it; "
        "megatron-lfr extend adds a segment)"
    )


def _setting(name: str) -> str:
    last = name.rpartition(".")[2]
    return _FLAGS.get(last, last)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)

"""Extending a run: one more segment after those that it has, which stay as they are.

Nothing that is trained changes, and no file but three: the facts in the journal's meta.json, config.yaml and its
history, which are replaced as one. Checkpoints keep the facts of their time, of which the run's are a continuation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.build import make_arrays, make_corpus, make_model_config, make_tokenizer
from megatron_lfr.config import RunConfig
from megatron_lfr.config.run import parse_settings, resolve_schedule
from megatron_lfr.data.corpus.block_values import digests_of
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.identity import check_facts, check_old_corpora, recorded_settings
from megatron_lfr.lfr import FocusScope, Plan
from megatron_lfr.lfr.functions import check_functions
from megatron_lfr.lfr.identity import describe_segments
from megatron_lfr.planning import describe_rate_ahead, describe_rate_change, make_blend, make_plan
from megatron_lfr.run_folder import RunFolder


@dataclass(frozen=True)
class Extension:
    """What the command asked for; None each: as in the segment before.

    steps, samples: the length of the new segment; none for a schedule whose phases have a length of their own.
    data_path: words as of --data-path, the run's prefixes first. lfr_scores: NAME=FILE.npy for names whose files are
    others from here on.
    """

    steps: int | None = None
    samples: int | None = None
    data_path: tuple[str, ...] = ()
    lfr_schedule: str | None = None
    lfr_scores: tuple[str, ...] = ()
    lfr_focus_scope: FocusScope | None = None
    replay: float = 0.0
    global_batch_size: int | None = None
    override_rate: bool = False


@dataclass(frozen=True)
class Extended:
    """What was made. notes: what a user should know of the scores and of the learning rate."""

    plan: Plan
    domains: list[str]
    notes: list[str]


def extend_run(path: Path, extension: Extension) -> Extended:
    """Give the run in `path` one more segment.

    ValueError or OSError where there is no run or no checkpoint, another process trains there, the corpus does not
    begin with the run's, the segment cannot be laid out, or the steps that are trained would have had another learning
    rate; then the folder is as before.
    """
    if not path.is_dir():
        raise ValueError(f"--run {path}: not a run folder")
    folder = RunFolder(path, "--run")
    with folder.hold():
        stored, step = _read_run(folder)
        before, _ = folder.plan()
        config = _new_config(folder, extension, before)
        corpus = make_corpus(config.data, before)
        check_old_corpora(stored["corpus"], corpus.digests())
        _check_documents(config, corpus)
        blend = make_blend(config, corpus)
        plan = make_plan(config, corpus.train.num_blocks, 1, blend, before, corpus.train.domains)
        arrays = make_arrays(config, corpus.digests, plan, folder.score_files(given=extension.lfr_scores))
        check_functions(plan, before.total_steps)
        notes = [*_begun_notes(before, step), *_score_notes(plan), *_rate_notes(config, extension, before, plan, step)]
        facts = {**stored, "corpus": corpus.digests(), "segments": describe_segments(plan, digests_of(arrays))}
        settings = recorded_settings(config)
        history = folder.history.continued(
            settings, step, Path.cwd(), RunConfig().to_flat(), segments=len(plan.segments)
        )
        folder.write_extension(json.loads(json.dumps(facts)), settings, history)
    return Extended(plan, corpus.train.domains, notes)


def _read_run(folder: RunFolder) -> tuple[dict[str, Any], int]:
    """Return the facts of a run, and the step of its newest checkpoint."""
    assert folder.recorded_settings is not None  # ValueError where there is no run
    facts = folder.identity()
    check_facts(folder.journal.meta_file, facts)
    checkpoint = folder.find_checkpoint()
    if checkpoint is None or "curriculum" not in checkpoint.state:
        raise ValueError(
            f"--run {folder.path}: has no checkpoint of a run; one of which nothing is trained needs no extension, as "
            "megatron-lfr train takes all of its corpus"
        )
    return facts, checkpoint.iteration


def _new_config(folder: RunFolder, extension: Extension, before: Plan) -> RunConfig:
    """Return the configuration whose flags describe the new segment."""
    in_place = folder.history.started_in in (None, Path.cwd())
    settings = dict(folder.recorded_settings if in_place else folder.settings())
    settings |= {
        "train_iters": None if extension.steps is None else before.total_steps + extension.steps,
        "train_samples": None if extension.samples is None else before.total_samples + extension.samples,
        "train_epochs": None,
        "replay": extension.replay,
        "global_batch_size": extension.global_batch_size or before.global_batch_size,
        "override_opt_param_scheduler": False,
        "versions": None,  # the main path goes on: its branch points are retained, and no more follow from its length
        "branch_share": settings.get("branch_share") if settings.get("versions") is None else None,
    }
    if extension.data_path:
        settings |= {"data_path": list(extension.data_path), "data_args_path": None}
    if extension.lfr_scores:
        before_it = [word for word in settings.get("lfr_scores") or [] if word not in extension.lfr_scores]
        settings["lfr_scores"] = [*before_it, *extension.lfr_scores]  # the last file of a name counts
    for name in ("lfr_schedule", "lfr_focus_scope"):
        if (given := getattr(extension, name)) is not None:
            settings[name] = given
    config = parse_settings(settings, str(folder.config_file))
    config.data.validate()
    config.lfr.validate()
    _check_batch(config)
    if extension.steps is None and extension.samples is None and resolve_schedule(config.lfr.lfr_schedule).in_shares:
        raise ValueError("--train-iters: give the length of the new segment as +STEPS, or the run's as STEPS")
    return config


def _check_batch(config: RunConfig) -> None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch is None or batch < 1 or batch % micro:
        raise ValueError(f"--global-batch-size {batch}: must be a multiple of --micro-batch-size {micro}")
    try:
        config.training.check_rampup(1)
    except ValueError as error:
        raise ValueError(f"--global-batch-size {batch}: the run keeps its {error}") from None


def _check_documents(config: RunConfig, corpus: BlockDataset) -> None:
    """ValueError where new documents were made with another tokenizer, or end or begin otherwise."""
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    assert model.vocab_size is not None
    settled = settle_documents(config.data, tokenizer, model.vocab_size, corpus.datasets)
    if settled.bos != config.data.bos:
        raise ValueError("--data-path: the new documents begin with a start-of-document token, but the run's do not")


def _begun_notes(before: Plan, step: int) -> list[str]:
    """Say where the last segment comes from an extension, too, of which nothing is trained: a second call by mistake
    makes a run longer than it was meant to be."""
    last = before.segments[-1]
    if len(before.segments) == 1 or last.phases[0].first_step < step:
        return []
    first = last.phases[0].first_step + 1
    return [
        f"segment {len(before.segments)}, steps {first:,} to {last.end_step:,}, is still to come: this one follows it"
    ]


def _score_notes(plan: Plan) -> list[str]:
    """Say where the first Focus of the new segment ranks old blocks by scores that are not of the present model."""
    segment = plan.segments[-1]
    old = set(range(segment.old_corpora))
    trained: set[int] = set()
    for planned in segment.phases:
        corpora = set(range(len(segment.blend.sizes))) if planned.corpora is None else set(planned.corpora)
        if planned.phase.kind == "focus":
            name = f"phase {planned.index} (focus, score: {planned.phase.score})"
            if not corpora & old or planned.phase.keeps_scores or planned.phase.score_mode in ("file", "shuffled"):
                return []
            if planned.phase.score == "recorded":
                return [
                    f"{name} ranks old blocks by losses of an older model, beside new ones of the present model: use "
                    "score: detrended or score: rescored"
                ]
            if not trained & old:
                return [
                    f"{name} comes before any old block is trained on again, so that no loss shows how the model has "
                    "moved on them: give --replay, or use score: rescored"
                ]
            return []
        trained |= corpora if not planned.phase.replay else set(range(len(segment.blend.sizes)))
    return []


def _rate_notes(config: RunConfig, extension: Extension, before: Plan, plan: Plan, step: int) -> list[str]:
    problem = describe_rate_change(config.optimizer, before, plan, step)
    if problem is None:
        ahead = describe_rate_ahead(config.optimizer, before, plan)
        return [] if ahead is None else [ahead]
    if not extension.override_rate:
        raise ValueError(
            f"--train-iters: {problem}. What is trained cannot be trained otherwise: extend a run whose rate is "
            "constant there, or take the new rate from here on with --override-opt_param-scheduler"
        )
    return [problem]


def describe(extended: Extended) -> list[str]:
    """Return a line for the new segment, and one for each of its phases."""
    segment = extended.plan.segments[-1]
    new = segment.n_blocks - segment.old_blocks
    lines = [
        f"segment {len(extended.plan.segments)}: {segment.n_blocks:,} blocks, {new:,} of them new, steps "
        f"{segment.phases[0].first_step + 1:,} to {segment.end_step:,} of {segment.global_batch_size:,} blocks each"
    ]
    for planned in segment.phases:
        scope = "all blocks"
        if planned.corpora is not None:
            scope = ", ".join(extended.domains[corpus] for corpus in planned.corpora)
        replay = f", and {100 * planned.phase.replay:g} % of others" if planned.phase.replay else ""
        lines.append(f"  {planned.index} {planned.phase.kind}: {planned.steps:,} steps on {scope}{replay}")
    return lines

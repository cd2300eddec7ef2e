"""`megatron-lfr evaluate`: the losses of a run's model on a corpus, and its results on tasks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from megatron_lfr.build import make_loader, open_validation
from megatron_lfr.data.corpus.block_values import DESCRIPTION_BEGINS, describing, description_of
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.engine import BlockLosses
from megatron_lfr.evaluation import block_file
from megatron_lfr.evaluation.block_file import BlockFile
from megatron_lfr.evaluation.continuations import Continuations
from megatron_lfr.evaluation.tasks import encode_task, read_task, score_task
from megatron_lfr.evaluation.trained import TrainedModel, load_trained
from megatron_lfr.fileio import check_replaces, json_value, write_atomic
from megatron_lfr.output import number, print_table
from megatron_lfr.parallel import ranks, session
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.evaluation import Keep, evaluate

Split = Literal["train", "valid", "test", "all", "none"]

_RESULTS_BEGIN = b'{\n "run":'
"""The beginning of a file of results; a file that begins so may be replaced."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate the model of a run: loss and perplexity by domain, and tasks.

    The configuration and the weights come from the run folder. Under torchrun, the ranks share the blocks and the
    items, and each rank holds the complete model.
    """

    run: Annotated[Path, tyro.conf.arg(aliases=["--load"])]
    """The run folder (--save of the training). Under torchrun write --load instead, as torchrun takes --run for a flag
    of its own."""
    iteration: int | None = None
    """Iteration of the checkpoint; by default that of the newest complete one."""
    data_path: list[str] = field(default_factory=list)
    """Prefixes of another corpus; by default the run's."""
    split: Split | None = None
    """Which documents of the corpus to evaluate, as the run's --split divides them; valid are those of its
    --valid-data-path, where it has one. all takes every document; none computes no losses, only tasks. By default
    valid, or all with --data-path."""
    per_block: Path | None = None
    """File for the mean loss of every block (nats per token), in the order of the blocks: .npy, fp32. It is NaN where
    every token of a block is masked. FILE.npy.json beside it says of which corpus, and what the losses cost in FLOPs;
    with --split train, a run can score the corpus by it (--lfr-scores)."""
    tasks: list[Path] = field(default_factory=list)
    """JSONL files of items: {"context", "choices", "answer"} or {"context", "target"}. White space before a choice is
    scored, but not counted in its length; "target_delimiter" gives it separately, as in lm-eval's tasks."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Tasks of the lm-eval package, which has to be installed. They run in one process only."""
    lm_eval_include_path: Path | None = None
    """Folder with the YAML files of your own lm-eval tasks."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""
    batch_size: int | None = None
    """Blocks or texts in one forward pass on each rank; by default the run's --micro-batch-size."""
    tokenizer_model: str | None = None
    """Where the run's tokenizer is now, if it was moved."""

    @property
    def split_in_force(self) -> Split:
        return self.split or ("all" if self.data_path else "valid")

    def validate(self, world_size: int) -> None:
        """Check what can be checked before the model is loaded; ValueError names the flag."""
        if self.per_block is not None:
            check_replaces("--per-block", self.per_block, block_file.BEGINS)
            check_replaces("--per-block", describing(self.per_block), DESCRIPTION_BEGINS)
            if self.per_block.exists() and not describing(self.per_block).exists():
                raise ValueError(
                    f"--per-block {self.per_block}: holds something else already, as no "
                    f"{describing(self.per_block).name} describes it; remove it, or give another name"
                )
            if self.json is not None and self.json.absolute() == describing(self.per_block).absolute():
                raise ValueError(f"--json {self.json}: is the description of --per-block; give another name")
        if self.json is not None:
            check_replaces("--json", self.json, _RESULTS_BEGIN)
        if self.per_block is not None and self.per_block.suffix != ".npy":
            raise ValueError(f"--per-block {self.per_block}: must end in .npy")
        if self.split == "none" and (self.per_block is not None or self.data_path):
            raise ValueError("--split none: goes with neither --per-block nor --data-path")
        if self.split == "none" and not (self.tasks or self.lm_eval_tasks):
            raise ValueError("--split none: nothing is left to do; give --tasks or --lm-eval-tasks")
        twice = {path for path in self.tasks if self.tasks.count(path) > 1}
        if twice:
            raise ValueError(f"--tasks {twice.pop()}: given twice")
        if self.lm_eval_tasks and find_spec("lm_eval") is None:
            raise ValueError("--lm-eval-tasks: needs the package lm-eval (pip install lm-eval)")
        if self.lm_eval_tasks and world_size > 1:
            raise ValueError(f"--lm-eval-tasks: runs in one process, {world_size} were started")
        if self.lm_eval_include_path is not None and not self.lm_eval_include_path.is_dir():
            raise ValueError(f"--lm-eval-include-path {self.lm_eval_include_path}: no such folder")


def main(argv: Sequence[str], world_size: int) -> int:
    """Run `megatron-lfr evaluate`."""
    config = tyro.cli(EvaluateConfig, args=list(argv), prog="megatron-lfr evaluate")
    with session():
        results = run(config, world_size)
        if ranks.rank() == 0:
            _print(results)
    return 0


def run(config: EvaluateConfig, world_size: int = 1) -> dict[str, Any]:
    """Evaluate, and write the files that the flags name. Returns the content of the --json file. Collective.

    Raises ValueError or OSError for anything wrong with flags, files and items, before the model runs.
    """
    config.validate(world_size)
    read, manager = [read_task(path) for path in config.tasks], None
    if config.lm_eval_tasks:
        from megatron_lfr.evaluation.lm_eval_adapter import find_tasks

        manager = find_tasks(config.lm_eval_tasks, config.lm_eval_include_path)
    trained = load_trained(config.run, config.iteration, config.batch_size, config.tokenizer_model)
    dataset, source = _source(config, trained)
    model = Continuations(trained)
    bos = trained.bos if read else None
    tasks = [(task, encode_task(task, trained.text_tokenizer, model.max_length, bos)) for task in read]
    results: dict[str, Any] = {"run": str(config.run), "iteration": trained.iteration}
    if source is not None:
        assert dataset is not None
        results["corpus"] = _evaluate_corpus(config, trained, dataset, source)
    if tasks:
        results["tasks"] = {str(task.path): score_task(task, encoded, model) for task, encoded in tasks}
    if manager is not None:
        from megatron_lfr.evaluation.lm_eval_adapter import evaluate_tasks

        results["lm_eval"] = evaluate_tasks(trained, config.lm_eval_tasks, manager)
    if config.json is not None and ranks.rank() == 0:
        text = json.dumps(json_value(results), indent=1, allow_nan=False, default=str)
        write_atomic(config.json, text + "\n")
    return results


def _source(config: EvaluateConfig, trained: TrainedModel) -> tuple[BlockDataset | None, BlockSource | None]:
    """Return the corpus, and its blocks to evaluate, None for --split none; ValueError where there is no block."""
    data, split = trained.config.data, config.split_in_force
    if split == "none":
        return None, None
    validation = open_validation(data) if split == "valid" and not config.data_path else None
    dataset = validation or _corpus(config, trained)
    vocab_size = trained.model.config.vocab_size
    assert vocab_size is not None
    any_start = dataclasses.replace(data, bos=False)  # documents of another corpus may start with another token
    settle_documents(any_start, trained.tokenizer, vocab_size, dataset.datasets)
    source: BlockSource = dataset.train if validation or split == "all" else getattr(dataset, split)
    if source.num_blocks == 0:
        raise ValueError(f"--split {split}: --split {data.split} of the run leaves no block there; try train or all")
    return dataset, source


def _corpus(config: EvaluateConfig, trained: TrainedModel) -> BlockDataset:
    """Open --data-path, or the run's; ValueError where that has changed, unless all of it is asked for."""
    data, takes_all = trained.config.data, config.split_in_force == "all"
    dataset = BlockDataset(config.data_path or data.corpora()[0], data.seq_length, "1" if takes_all else data.split)
    if not (config.data_path or takes_all) and trained.corpus not in (None, dataset.digests()):
        raise ValueError(
            f"--run {config.run}: its corpus has changed since it was trained on, and so has what was held out; say "
            "with --data-path, and --split, what to evaluate on"
        )
    return dataset


def _describe_losses(
    config: EvaluateConfig,
    trained: TrainedModel,
    dataset: BlockDataset,
    source: BlockSource,
    losses: npt.NDArray[np.float32],
) -> str:
    """Return the description of the file of --per-block, with the FLOPs behind it: a token of a forward pass costs a
    third of one of training."""
    seq_length = trained.config.data.seq_length
    per_token = trained.model.config.flops_per_token(seq_length)
    try:
        plan, _ = RunFolder(config.run).plan()
        training = per_token * seq_length * plan.samples_before(trained.iteration)
    except ValueError:  # weights that no run of ours has trained
        training = None
    return description_of(
        losses,
        dataset.digests(),
        f"loss of {config.run} at iteration {trained.iteration}",
        split=config.split_in_force,
        flops={"training": training, "forward": per_token / 3 * seq_length * source.num_blocks},
    )


def _evaluate_corpus(
    config: EvaluateConfig, trained: TrainedModel, dataset: BlockDataset, source: BlockSource
) -> dict[str, Any]:
    loader = make_loader(trained.config, source, trained.tokenizer, trained.parallel)
    with ExitStack() as stack:
        keep: Keep | None = None
        if config.per_block is not None and ranks.rank() == 0:
            describe = partial(_describe_losses, config, trained, dataset, source)
            file = stack.enter_context(BlockFile(config.per_block, source.num_blocks, describe))

            def keep(_: slice, losses: BlockLosses) -> None:
                with np.errstate(invalid="ignore"):
                    file.append(losses[0] / losses[1])

        means = evaluate(trained.engine, loader, None, trained.iteration, -1, keep)
    return {
        "split": config.split_in_force,
        "blocks": source.num_blocks,
        "tokens": means.tokens,
        **_loss_and_perplexity(means.loss),
        "domains": {name: _loss_and_perplexity(loss) for name, loss in means.domains.items()},
    }


def _loss_and_perplexity(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _print(results: dict[str, Any]) -> None:
    print(f"{results['run']} at iteration {results['iteration']}")
    if "corpus" in results:
        corpus = results["corpus"]
        print(f"{corpus['split']}: {corpus['blocks']:,} blocks, {corpus['tokens']:,} tokens")
        rows = [
            [name, number(row["loss"]), number(row["perplexity"])]
            for name, row in (("all", corpus), *corpus["domains"].items())
        ]
        print_table(["domain", "loss a token", "perplexity"], rows)
    named = {**results.get("tasks", {}), **results.get("lm_eval", {})}
    if named:
        rows = [row for task, measures in named.items() for row in _task_rows(task, measures)]
        print_table(["task", "measure", "value", "standard error"], rows, left=["task", "measure"])


def _task_rows(task: str, measures: dict[str, Any]) -> Iterator[list[str]]:
    for measure, value in measures.items():
        if isinstance(value, int | float) and "_stderr" not in measure:
            error = measures.get(_stderr_key(measure))
            text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            yield [task, measure, text, number(error)]


def _stderr_key(measure: str) -> str:
    """Return the key of a measure's standard error: acc_stderr for acc, and lm-eval's "acc_stderr,none" for
    "acc,none"."""
    name, comma, rest = measure.partition(",")
    return f"{name}_stderr{comma}{rest}"

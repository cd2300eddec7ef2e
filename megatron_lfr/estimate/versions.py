"""`megatron-lfr estimate versions`: what it takes to train several versions of a model, from scratch and otherwise."""

from __future__ import annotations

from typing import Any

from megatron_lfr.build import make_model_config, make_tokenizer
from megatron_lfr.config import RunConfig, fill_batch
from megatron_lfr.estimate.options import Options, corpus_blocks, duration, with_defaults
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.output import print_table
from megatron_lfr.planning import make_new_plan

USAGE = """megatron-lfr estimate versions --versions N --branch-share A [flags of megatron-lfr train, also --config] and

  --world-size N, --blocks N, --corpus-tokens N, --tokens-per-second X, --json: as in megatron-lfr estimate

The run's length, for instance --train-iters, is that of the last version: each version adds an N-th of it. Compared are
training each version from scratch on all data so far; from the version before, on the new data (continual); and
path switching: a main path at one learning rate, and for each version a branch of the share A of its steps. The main
path ends where the last version leaves it, or goes on to the last version's end.
"""

_WAYS = {
    "from_scratch": "from scratch",
    "continual": "continual",
    "path_switching": "path switching",
    "path_switching_to_the_end": "path switching, main path to its end",
}


def estimate_versions(config: RunConfig, options: Options) -> dict[str, Any]:
    """Return everything that is printed, as plain values: steps, tokens, floating-point operations, seconds, and the
    share of what training from scratch takes; also for fewer versions. ValueError names the flag that is missing."""
    if config.main_path.versions is None:
        raise ValueError("give --versions and --branch-share")
    world_size = options.world_size or config.parallel.model_parallel_size
    config = fill_batch(config, world_size)
    with_defaults(config, options).validate(world_size)
    model = config.model if config.model.vocab_size else make_model_config(config, make_tokenizer(config.data))
    n_blocks, blend = corpus_blocks(config, options)
    plan = make_new_plan(config, n_blocks, world_size, blend)
    path = config.main_path.lay_out(plan)
    assert path is not None
    tokens = plan.global_batch_size * plan.seq_length
    flops = config.lora.flops_per_token(model, plan.seq_length)

    def row(steps: int) -> dict[str, Any]:
        speed = options.tokens_per_second
        return {
            "steps": steps,
            "tokens": steps * tokens,
            "flops": steps * tokens * flops,
            "seconds": None if speed is None else steps * tokens / speed,
            "share": steps / path.from_scratch_steps,
        }

    return {
        "version_steps": path.ends[0],
        "branch_steps": path.branches[0],
        "branch_points": path.branch_points,
        "ways": {way: row(steps) for way, steps in _steps(path).items()},
        "shares_by_versions": {count: _shares(path.first(count)) for count in range(1, path.versions + 1)},
    }


def _steps(path: MainPath) -> dict[str, int]:
    counts = (path.from_scratch_steps, path.continual_steps)
    return dict(zip(_WAYS, (*counts, path.path_switching_steps(), path.path_switching_steps(True)), strict=True))


def _shares(path: MainPath) -> dict[str, float]:
    return {way: steps / path.from_scratch_steps for way, steps in _steps(path).items()}


def print_tables(result: dict[str, Any]) -> None:
    """Print what `estimate_versions` returns."""
    points = ", ".join(map(str, result["branch_points"]))
    print(
        f"versions of {result['version_steps']:,} steps of new data each; branches of {result['branch_steps']:,}, "
        f"which leave the main path after steps {points}"
    )
    has_times = result["ways"]["from_scratch"]["seconds"] is not None
    rows = [
        [
            _WAYS[way],
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
            f"{row['flops']:.3e}",
            *([duration(row["seconds"])] if has_times else []),
            _percent(row["share"]),
        ]
        for way, row in result["ways"].items()
    ]
    head = ["all versions", "steps", "tokens", "FLOP", *(["time"] if has_times else []), "share"]
    print_table(head, rows, "What all versions take together, and the share of from scratch")
    rows = [
        [str(count), *(_percent(shares[way]) for way in _WAYS if way != "from_scratch")]
        for count, shares in result["shares_by_versions"].items()
    ]
    print_table(
        ["versions", *(name for way, name in _WAYS.items() if way != "from_scratch")],
        rows,
        "Share of from scratch, by the number of versions",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

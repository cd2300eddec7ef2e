"""`megatron-lfr benchmark`: the speed of a configuration, launched as `train` is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.benchmark.compare import print_comparison
from megatron_lfr.benchmark.inputs import complete
from megatron_lfr.benchmark.measure import measure
from megatron_lfr.benchmark.options import Options, take_options
from megatron_lfr.benchmark.sweep import parse_sweep, print_sweep, run_sweep
from megatron_lfr.benchmark.tables import print_result
from megatron_lfr.config import fill_batch, parse_run_config, take_option
from megatron_lfr.estimate.results import FORMAT, read_result
from megatron_lfr.fileio import check_replaces, json_value, write_atomic
from megatron_lfr.parallel.launchers import adopt_launcher
from megatron_lfr.training.launch import start_ranks, take_nproc_per_node

USAGE = """megatron-lfr benchmark [flags of megatron-lfr train, also --config and --nproc-per-node] and

  --steps N         steps that are timed as they are in train (20)
  --warmup N        steps before them (5)
  --traced-steps N  steps after them whose parts are timed (5)
  --blocks N        without --data-path: number of blocks of random tokens, for what orders cost
  --json FILE       write the result there (docs/benchmark.md has the keys)
  --against FILE    compare with an earlier result
  --sweep 'NAME=VALUE,VALUE NAME=VALUE,VALUE'
                    benchmark all combinations of these settings, also nproc_per_node; goes on where one does not fit

Without --data-path it trains on random tokens and needs --vocab-size. It writes no checkpoint, and nothing to --save.
Start it as train is started: --nproc-per-node, torchrun, srun, mpirun.
"""


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr benchmark`; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    options, rest = take_options(argv)
    old = None if options.against is None else read_result(options.against, "--against")
    if options.json is not None and adopt_launcher().rank == 0:
        check_replaces("--json", options.json, b'{\n "format"')
    if options.sweep is not None:
        return _sweep(options, argv)
    local_ranks, rest = take_nproc_per_node(rest)
    config, notes = parse_run_config(rest)
    if local_ranks is not None:
        complete(fill_batch(config, local_ranks), options).validate(local_ranks)
        _, words = take_nproc_per_node(argv)
        return start_ranks(local_ranks, ["-m", "megatron_lfr", "benchmark", *words])
    result = measure(config, options)
    if adopt_launcher().rank == 0:
        for note in notes:
            print(note)
        print_result(result)
        if old is not None:
            print_comparison(result, old)
        if options.json is not None:
            _write(options.json, result)
    return 0


def _sweep(options: Options, argv: Sequence[str]) -> int:
    """Run a sweep. ValueError where a launcher has started the ranks already: each combination starts its own."""
    assert options.sweep is not None
    if options.against is not None:
        raise ValueError("--against: goes with one result, not with --sweep")
    swept = parse_sweep(options.sweep)
    local_ranks, rest = take_nproc_per_node(argv)  # refuses ranks that a launcher has started
    if adopt_launcher().launcher is not None:
        raise ValueError("--sweep: starts ranks itself, with --nproc-per-node; ranks have been started already")
    for flag in ("--sweep", "--json"):
        _, rest = take_option(rest, flag)
    rows = run_sweep(swept, rest, local_ranks)
    print_sweep(rows)
    if options.json is not None:
        _write(options.json, {"format": FORMAT, "sweep": rows})
    return 0


def _write(path: Path, result: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(json_value(result), indent=1, allow_nan=False) + "\n")

"""Compares the planner's step times with published ones, fits its constants, and writes the tables of docs/planner.md.

    python tools/planner_validation.py [--fit] [--page docs/planner.md]

The constants are fitted to the rows of one source (llm-foundry), by least squares of the logarithms of the speeds; the
others are only predicted. Figures and sources: benchmarks/published/step_times.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.estimate.step_time import CONSTANTS, Constants, Hardware, Layout, Shape, step_time
from megatron_lfr.parallel.devices import DEVICES

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "published" / "step_times.csv"
FITTED_ON = "llm-foundry"
BEGIN, END = "<!-- begin: tools/planner_validation.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """A published figure, and what it is of."""

    source: str
    figure: str
    url: str
    measured: float
    """Tokens a second and GPU."""
    shape: Shape
    layout: Layout
    hardware: Hardware

    def predicted(self, constants: Constants) -> float:
        """Return the tokens a second and GPU that the model gives."""
        seconds = step_time(self.shape, self.layout, self.hardware, constants).total
        return self.layout.tokens_per_step / seconds / self.layout.ranks


def read_rows(path: Path = ROWS) -> list[Row]:
    """Read the published figures."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Row:
    def number(name: str) -> int:
        return int(cells[name])

    device = DEVICES[cells["device"]]
    if cells["memory_gb_per_second"]:
        device = dataclasses.replace(device, memory_gb_per_second=float(cells["memory_gb_per_second"]))
    shape = Shape(
        **{name: number(name) for name in ("layers", "hidden", "queries", "keys", "ffn", "vocabulary")},
        is_gated=bool(number("gated")),
        is_tied=bool(number("tied")),
        materializes_scores=bool(number("materializes_scores")),
    )
    data = number("gpus") // number("tensor") // number("pipeline")
    layout = Layout(
        seq_length=number("seq_length"),
        micro_batch=number("micro_batch"),
        micro_batches=max(1, number("global_batch") // data // number("micro_batch")),
        data=data,
        tensor=number("tensor"),
        sequence_parallel=bool(number("sequence_parallel")),
        pipeline=number("pipeline"),
        stages_per_rank=number("stages_per_rank"),
        sharding=cells["sharding"],  # type: ignore[arg-type]
        recompute=cells["recompute"],  # type: ignore[arg-type]
        is_compiled=bool(number("compiled")),
    )
    value = float(cells["value"])
    if cells["unit"].startswith("TFLOP/s"):
        value = value * 1e12 / megatron_flops_per_token(shape, layout.seq_length)
    hardware = Hardware(device, number("gpus_per_node"))
    return Row(cells["source"], cells["figure"], cells["url"], value, shape, layout, hardware)


def megatron_flops_per_token(shape: Shape, seq_length: int) -> float:
    """Return the operations of a token with full recomputation, by equation 3 of Narayanan et al. 2021
    (https://arxiv.org/abs/2104.04473), in which Megatron-LM's figures are given."""
    layers, hidden = shape.layers, shape.hidden
    return 96 * layers * hidden**2 * (1 + seq_length / (6 * hidden) + shape.vocabulary / (16 * layers * hidden))


def fit(rows: Sequence[Row]) -> Constants:
    """Fit the constants to rows, within bounds that are physical."""
    from scipy.optimize import least_squares

    names = [field.name for field in dataclasses.fields(Constants)]
    low, high = [0.3, 0.1, 0.2, 0.3, 0.0], [1.0] * 5

    def errors(values: Sequence[float]) -> list[float]:
        constants = Constants(**dict(zip(names, values, strict=True)))
        return [math.log(row.predicted(constants) / row.measured) for row in rows]

    # From several starts, as the least error has valleys.
    starts = np.random.default_rng(0).uniform(low, high, (20, len(names)))
    solutions = [least_squares(errors, start, bounds=(low, high), loss="soft_l1") for start in starts]
    solution = min(solutions, key=lambda one: float(one.cost))
    return Constants(**{name: round(float(value), 3) for name, value in zip(names, solution.x, strict=True)})


def error(row: Row, constants: Constants) -> float:
    """Return by how much the predicted speed differs from the published one, as a share of that."""
    return row.predicted(constants) / row.measured - 1


def tables(rows: Sequence[Row], constants: Constants) -> str:
    """Return the tables of the page, as Markdown."""
    lines = ["| constant | value |", "|---|---|"]
    lines += [f"| {name} | {value:g} |" for name, value in vars(constants).items()]
    lines += ["", "| source | rows | median error | largest | used to fit |", "|---|---|---|---|---|"]
    for source in dict.fromkeys(row.source for row in rows):
        same = [row for row in rows if row.source == source]
        lines.append(_summary(source, same, constants) + (" yes |" if source == FITTED_ON else " no |"))
    others = [row for row in rows if row.source != FITTED_ON]
    lines.append(_summary(f"all but {FITTED_ON}", others, constants) + " |")
    lines += ["", *_orders(rows, constants), ""]
    lines += ["| source | figure | measured | predicted | error |", "|---|---|---|---|---|"]
    lines += [
        f"| [{row.source}]({row.url}) | {row.figure} | {row.measured:,.0f} | {row.predicted(constants):,.0f} | "
        f"{100 * error(row, constants):+.0f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def _summary(name: str, rows: Sequence[Row], constants: Constants) -> str:
    errors = [100 * abs(error(row, constants)) for row in rows]
    return f"| {name} | {len(errors)} | {statistics.median(errors):.0f} % | {max(errors):.0f} % |"


def pairs_in_order(rows: Sequence[Row], constants: Constants) -> tuple[int, int]:
    """Return how many pairs of rows of one model are predicted in the order in which they were measured, and of how
    many, where the two differ by at least 3 %."""
    right = total = 0
    for number, one in enumerate(rows):
        for other in rows[:number]:
            ratio = one.measured / other.measured
            if one.shape == other.shape and not 0.97 < ratio < 1.03:
                total += 1
                right += (one.predicted(constants) > other.predicted(constants)) == (ratio > 1)
    return right, total


def _orders(rows: Sequence[Row], constants: Constants) -> list[str]:
    lines = ["| source | model | layouts | pairs in the measured order |", "|---|---|---|---|"]
    for source in dict.fromkeys(row.source for row in rows):
        for shape in dict.fromkeys(row.shape for row in rows if row.source == source):
            same = [row for row in rows if row.source == source and row.shape == shape]
            right, total = pairs_in_order(same, constants)
            if len(same) >= 4:
                lines.append(f"| {source} | {shape.weights / 1e9:.1f}B | {len(same)} | {right} of {total} |")
    return lines


def write_page(page: Path, text: str) -> None:
    """Replace what is between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants, print them and use them here")
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    args = parser.parse_args(arguments)
    rows = read_rows()
    constants: Any = CONSTANTS
    if args.fit:
        constants = fit([row for row in rows if row.source == FITTED_ON])
        print(constants)
    text = tables(rows, constants)
    print(text)
    if args.page:
        write_page(args.page, text)


if __name__ == "__main__":
    main()

"""The results of a study's runs, and what is compared between them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.similarity import BlockSet
from megatron_lfr.commonness.items import reference_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.output import is_number
from megatron_lfr.study.definition import CANDIDATE, Candidate, Contrast, Study
from megatron_lfr.study.layout import Layout, PlannedRun
from megatron_lfr.study.stored import arrays_file, names_of, read_result, result_file

Cell = tuple[str, str, str]
"""Corpus, size and rate."""
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """The JSON of a run, and the arrays beside it."""

    json: dict[str, Any]
    arrays_file: Path

    @property
    def cell(self) -> Cell:
        return self.json["corpus"], self.json["size"], self.json["rate"]

    @property
    def arm(self) -> str:
        return str(self.json["arm"])

    @property
    def size(self) -> str:
        return str(self.json["size"])

    @property
    def seed(self) -> int:
        return int(self.json["seed"])

    @property
    def loss(self) -> float:
        """The macro held-out loss: the mean of the domains' losses, nats a token."""
        return float(self.json["held_out"]["macro"])

    @property
    def compute(self) -> float:
        """All that was computed for the run, in forward_backward tokens of its model."""
        return float(self.json["compute"]["total"])

    @property
    def junk_rule(self) -> int | None:
        """The number of the rule by which commonness found junk for the run; None where it was not asked."""
        rule: int | None = self.json.get("junk_rule")
        return rule

    def held_out(self) -> Doubles:
        """Read the losses of the held-out blocks [blocks], NaN where a block is masked."""
        with np.load(self.arrays_file, allow_pickle=False) as arrays:
            return np.asarray(arrays["held_out"], np.float64)

    def dropped(self) -> dict[str, BlockSet]:
        """Read what each Focus dropped, by the number of its phase."""
        with np.load(self.arrays_file, allow_pickle=False) as arrays:
            names = [name.removeprefix("dropped_") for name in arrays if name.startswith("dropped_")]
            return {name: self._block_set(arrays, name) for name in names}

    def _block_set(self, arrays: Mapping[str, npt.NDArray[Any]], phase: str) -> BlockSet:
        bits, candidates, starts = (arrays[f"{part}_{phase}"] for part in ("dropped", "candidates", "starts"))
        return BlockSet(bits, candidates, int(self.json["blocks"]), tuple(starts.tolist()))


@dataclass(frozen=True)
class Results:
    """All results of a study. open_runs: what names those that have none yet, as of `names_of`. seq_length: of
    all runs."""

    study: Study
    runs: list[Result]
    open_runs: list[dict[str, Any]]
    seq_length: int

    def cells(self) -> list[Cell]:
        """Return the cells that have a result, in the order of the study."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    def open_arms(self, cell: Cell) -> set[str]:
        """Return the arms that have runs without a result in a cell."""
        return {run["arm"] for run in self.open_runs if (run["corpus"], run["size"], run["rate"]) == cell}

    def of(self, cell: Cell, arm: str, seeds: Iterable[int] | None = None) -> dict[int, Result]:
        """Return the results of an arm at its usual compute, by seed."""
        return {
            run.seed: run
            for run in self.runs
            if run.cell == cell
            and run.arm == arm
            and run.json["compute_point"] == 1
            and (seeds is None or run.seed in seeds)
        }

    def curve(self, cell: Cell, seed: int) -> list[Result]:
        """Return the reference's results at all compute points, by rising compute."""
        reference = self.study.reference
        runs = [run for run in self.runs if run.cell == cell and run.arm == reference and run.seed == seed]
        return sorted(runs, key=lambda run: run.compute)

    def arms(self, cell: Cell) -> list[str]:
        """Return the arms that have a result in a cell, in the order of the study."""
        present = {run.arm for run in self.runs if run.cell == cell}
        return [arm for arm in self.study.arms if arm in present]


def load_results(study: Study, layout: Layout, output: Path) -> Results:
    """Read what is done of a study. ValueError names a file that is no result, damaged, or one of other settings."""
    runs, open_runs = [], []
    blocks = BlockDataset(study.held_out, layout.seq_length, "1").train.num_blocks
    for run in layout.runs.values():
        content = read_result(output, run)
        if content is None:
            open_runs.append(names_of(run))
        else:
            path = result_file(output, run.name)
            result = Result(content, arrays_file(path, content))
            _check(result, path, run, blocks)
            runs.append(result)
    return Results(study, runs, open_runs, layout.seq_length)


def _check(result: Result, path: Path, run: PlannedRun, blocks: int) -> None:
    """Check that a result is of its run, and has the figures that all comparisons need; ValueError names the file."""
    try:
        if wrong := [key for key, value in names_of(run).items() if result.json[key] != value]:
            raise ValueError(f"its {wrong[0]} is {result.json[wrong[0]]!r}")
        domains = result.json["held_out"]["domains"]
        figures = [result.json["held_out"]["macro"], result.json["compute"]["total"], *dict(domains).values()]
        if not domains or not all(map(is_number, figures)):
            raise ValueError("a loss or its compute is no number")
        if (shape := result.held_out().shape) != (blocks,):
            raise ValueError(f"it has losses {list(shape)} of {blocks} held-out blocks")
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: no result of {run.name}, or damaged ({error!r}); remove it, and run the study again"
        ) from None


@dataclass(frozen=True)
class HeldOut:
    """The held-out blocks: the document that holds the middle of each (numbered within its domain), and its domain."""

    documents: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64]


def held_out_blocks(prefixes: Sequence[str], seq_length: int) -> HeldOut:
    """Return the clusters of the held-out blocks. A block may hold the end of one document and the beginning of the
    next: it counts for the one that its middle token is of."""
    corpus = BlockDataset(prefixes, seq_length, "1")
    documents = []
    for number, prefix in enumerate(reference_prefixes(corpus.datasets)):
        middles = corpus.train.token_starts(number) + seq_length // 2
        documents.append(np.searchsorted(prefix.offsets, middles, side="right") - 1)
    domains = corpus.train.domain_of(np.arange(corpus.train.num_blocks))
    return HeldOut(np.concatenate(documents).astype(np.int64), domains)


def pick_candidate(results: Results, rule: Candidate) -> str | None:
    """Return the arm that the rule picks: the lowest mean macro held-out loss at the rule's seeds. None until all of
    its runs are done."""
    cell = rule.corpus, rule.size, rule.rate
    means = {}
    for arm in rule.among:
        runs = results.of(cell, arm, rule.seeds)
        if len(runs) < len(rule.seeds):
            return None
        means[arm] = float(np.mean([run.loss for run in runs.values()]))
    return min(means, key=lambda arm: means[arm])


def resolve(contrasts: Sequence[Contrast], candidate: str | None) -> list[Contrast]:
    """Put the candidate in the place of its name; contrasts with one that is not picked yet, or with itself, are left
    out."""
    resolved = []
    for contrast in contrasts:
        names = [candidate if name == CANDIDATE else name for name in (contrast.arm, contrast.against)]
        if names[0] is not None and names[1] is not None and names[0] != names[1]:
            resolved.append(Contrast(names[0], names[1]))
    return list(dict.fromkeys(resolved))

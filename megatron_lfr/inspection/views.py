"""What `megatron-lfr inspect` prints. Each view returns the records that it shows."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.replay import PhaseHistory, Run, visits_of
from megatron_lfr.analysis.single_blocks import largest
from megatron_lfr.analysis.spikes import find_spikes
from megatron_lfr.output import number, print_table, visible
from megatron_lfr.run_folder import Corpus

Records = npt.NDArray[np.void]


class View:
    """Prints answers about `run`; without `corpus`, blocks are shown as numbers only."""

    def __init__(self, run: Run, corpus: Corpus | None, limit: int, chars: int) -> None:
        self._run, self._corpus, self._limit, self._chars = run, corpus, limit, chars

    def step(self, step: int) -> Records:
        """Print the blocks of a step, the hardest first; returns its visits."""
        visits = self._run.visits_at(step)
        nll_before, step_before = self._run.last_before(visits["block"], step)
        order = np.argsort(-np.nan_to_num(visits["nll"], nan=-1.0), kind="stable")
        title = f"step {step}, {self._phase(int(visits['phase'][0]))}: {len(visits)} blocks"
        known = visits["nll"][~np.isnan(visits["nll"])]
        print(f"{title}, mean loss {known.mean(dtype=np.float64):.4f}" if len(known) else f"{title}, step skipped")
        for i in order[: self._limit]:
            before = "not seen before"
            if step_before[i] > 0:
                before = f"before {nll_before[i]:.4f} at step {step_before[i]}"
            loss = number(float(visits["nll"][i]), missing="not recorded")
            self._block(int(visits["block"][i]), f"loss {loss}, {before}")
        if len(order) > self._limit:
            print(f"... and {len(order) - self._limit} more (--limit)")
        return visits[order]

    def spikes(self, deviations: float) -> Records:
        """Print the steps that stand out, and the blocks of the worst one; returns the spikes."""
        spikes = find_spikes(self._run, deviations)
        if not len(spikes):
            print(f"no step is more than {deviations:g} standard deviations above the running median (--deviations)")
            return spikes
        rows = []
        for row in spikes[: self._limit]:
            phase = self._phase(int(row["phase"])).removeprefix("phase ")
            numbers = (f"{row['value']:.4f}", f"{row['median']:.4f}", f"{row['deviations']:.1f}")
            rows.append([str(row["step"]), phase, str(row["what"]), *numbers])
        print_table(["step", "phase", "what", "value", "running median", "deviations"], rows, left=["phase", "what"])
        if len(spikes) > self._limit:
            print(f"... and {len(spikes) - self._limit} more (--limit)")
        self.step(int(spikes["step"][0]))
        return spikes

    def block(self, block: int) -> Records:
        """Print every visit of a block, and whether each Focus left it out; returns the visits.

        ValueError where the run has no such block.
        """
        if not 0 <= block < self._run.plan.n_blocks:
            raise ValueError(f"--block {block}: the run's blocks are 0 to {self._run.plan.n_blocks - 1}")
        parts, lines = [visits_of([], [block], self._run.plan.n_blocks)], []
        for history in self._run.phases():
            name = f"phase {history.planned.index} {history.kind}"
            if history.selection is not None and self._run.plan.in_scope(history.planned)[block]:
                lines.append(f"  {'':13}  {name:16}  {_choice(history, block)}")
            parts.append(visits_of([history], [block], self._run.plan.n_blocks))
            for visit in parts[-1]:
                loss = number(float(visit["nll"]), missing="not recorded")
                lines.append(f"  step {visit['step']:>8}  {name:16}  {loss}")
        visits = np.concatenate(parts)
        self._block(block, f"visits: {len(visits)}")
        for line in lines:
            print(line)
        return visits

    def extremes(self, count: int, hardest: bool) -> Records:
        """Print the hardest or easiest blocks, by what their last loss amounts to now; returns all their visits."""
        ledger = self._run.ledger()
        scores = ledger.detrended_scores()
        chosen = largest(scores if hardest else -scores, count)
        for block in chosen.tolist():
            at, visits = ledger.step[block] + 1, ledger.visits[block]
            loss = f"loss {ledger.nll[block]:.4f} at step {at} (amounts to {scores[block]:.4f} now)"
            self._block(block, f"{loss}, visits: {visits}")
        return self._run.visits(chosen)

    def domain(self, name: str) -> Records:
        """Print and return the mean loss of a domain in each phase. ValueError where the corpus has no such domain."""
        assert self._corpus is not None
        domains, starts = self._corpus.domains, self._corpus.starts.tolist()
        if name not in domains:
            raise ValueError(f"--domain {name}: choose from {', '.join(map(visible, domains))}")
        first, last = starts[domains.index(name)], starts[domains.index(name) + 1]
        means = self._run.phase_means(first, last)
        print(f"{visible(name)}: {last - first} blocks")
        rows = []
        for row in means:
            phase = self._phase(int(row["phase"])).removeprefix("phase ")
            rows.append([phase, f"{row['visits']:,}", f"{row['blocks']:,}", number(float(row["nll"]))])
        print_table(["phase", "visits", "blocks", "mean loss"], rows)
        return means

    def _block(self, block: int, what: str) -> None:
        corpus = self._corpus
        if corpus is None:
            print(f"block {block}: {what}")
            return
        first, last = corpus.documents(block)
        documents = f"documents {first} to {last}" if last > first else f"document {first}"
        trained = corpus.trained_tokens(block)
        masked = "" if trained is None else f", {trained} tokens trained on"
        print(f"block {block} ({visible(corpus.domain(block))}, {documents}{masked}): {what}")
        text = " ".join(map(str, corpus.tokens(block))) if corpus.no_text else corpus.text(block)
        print(f"    {visible(text[: self._chars])}")

    def _phase(self, index: int) -> str:
        return f"phase {index} {self._kinds[index]}"

    @cached_property
    def _kinds(self) -> list[str]:
        return [history.kind for history in self._run.phases()]


def _choice(history: PhaseHistory, block: int) -> str:
    """Say whether a Focus keeps a block, why not, and whether it was drawn at random nevertheless."""
    assert history.selection is not None
    score = float(history.scores[block])
    is_left_out = bool(history.selection.left_out(history.scores)[block])
    known = "without a score" if np.isnan(score) else f"score {score:.4f}"
    if not is_left_out:
        return f"kept, {known}"
    drawn = ", but drawn at random (explore)" if block in history.block_ids else ""
    if np.isnan(score):
        return f"left out, {known}{drawn}"
    end = "easiest" if history.selection.easiest(history.scores)[block] else "hardest"
    return f"left out as one of the {end}, {known}{drawn}"

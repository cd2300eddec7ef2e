"""Takes steps as `train` does, without evaluations and checkpoints, and times them."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch

from megatron_lfr.benchmark.collectives import CollectiveCounter, counting
from megatron_lfr.benchmark.parts import STEP, PartTimer, timing
from megatron_lfr.config import RunConfig
from megatron_lfr.data.corpus.loader import Batch, Loader, check_vocabulary
from megatron_lfr.engine import Engine
from megatron_lfr.learning_rate import LearningRate
from megatron_lfr.lfr import BaseCurriculum
from megatron_lfr.parallel.spans import span
from megatron_lfr.training.recording import Recorder, StepReport
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.upkeep import AfterStep


class Steps:
    """The steps of a run, from its first on: loader, engine and recorder are those of `train`."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: Loader,
        curriculum: BaseCurriculum,
        learning_rate: LearningRate,
        after_step: Sequence[AfterStep],
    ) -> None:
        self._engine, self._loader, self._curriculum = engine, loader, curriculum
        self._learning_rate, self._after_step = learning_rate, after_step
        self._times = Stopwatch()
        self._reports: list[StepReport] = []
        self._recorder = Recorder(curriculum, config.training.max_skipped_steps, self._times, self._reports.append)
        self._stopping = Stopping(config.training, engine.parallel.control_group)
        self._batches = self._iterate()

    def train(self, count: int) -> tuple[list[StepReport], float]:
        """Take steps. Returns a report of each, and the seconds that all took together."""
        self._settle()
        started = time.perf_counter()
        for _ in range(count):
            self._step(*next(self._batches))
        self._settle()
        return self._take_reports(), time.perf_counter() - started

    def trace(self, count: int) -> tuple[list[StepReport], list[dict[str, float]]]:
        """Take steps one after the other, each to its end, and time their parts. Returns a report and the seconds of
        the parts of each."""
        timer, parts = PartTimer(self._engine.parallel.device), []
        self._settle()
        with timing(timer):
            for _ in range(count):
                self._step(*next(self._batches), to_end=True)
                parts.append(timer.take(self._engine.parallel.mesh["pipeline"].size() > 1))
        return self._take_reports(), parts

    def count_collectives(self) -> CollectiveCounter:
        """Take a step, and count what the ranks send each other."""
        batch, waited = next(self._batches)
        with counting(self._engine.parallel) as counter:
            self._step(batch, waited)
            self._settle()
        self._reports.clear()
        return counter

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()

    def _iterate(self) -> Generator[tuple[Batch, float], None, None]:
        while True:
            self._recorder.finish()
            self._curriculum.enter_phase()
            yield from self._times.each("waiting for data", self._loader.iterate(self._curriculum.remaining_steps()))

    def _step(self, batch: Batch, waited: float, to_end: bool = False) -> None:
        check_vocabulary(batch, self._engine.vocab_size)
        done, lr = batch.step + 1, self._learning_rate(batch.step)
        with self._times.part("training steps") as launching:
            agreed = self._stopping.ask(done, save=False)
            with span(STEP):
                losses = self._engine.train_step(batch, lr)
                if to_end:
                    losses.wait()
            agreed()
        self._recorder.add(batch, losses, lr, launching.seconds + waited, waited)
        if to_end:
            self._recorder.finish()
        for act in self._after_step:
            act(done)

    def _settle(self) -> None:
        """Wait for all that was launched."""
        self._recorder.finish()
        if self._engine.parallel.device.type == "cuda":
            torch.cuda.synchronize(self._engine.parallel.device)

    def _take_reports(self) -> list[StepReport]:
        reports, self._reports[:] = list(self._reports), []
        return reports

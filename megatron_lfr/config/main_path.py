"""Settings of a main path, from which versions of a model branch off."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lfr.learning_rate import LearningRate
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.lfr.plan import Plan


@dataclass(frozen=True)
class MainPathConfig:
    """The main path of several versions of a model, at one learning rate (arXiv 2410.04103)."""

    versions: int | None = None
    """Make the run the main path of this many versions: each adds as many of the run's steps, and leaves in a branch of
    its own (`megatron-lfr branch --version I`). Checkpoints at the branch points are kept; the run ends at the last."""
    branch_share: float | None = None
    """The share of a version's steps that its branch has, which ends where the version does. Without --versions, each
    segment of the run is a version (`megatron-lfr extend` gives it one more), and the run goes on to its end."""

    def validate(self) -> None:
        """ValueError names the flag and the legal values."""
        if self.versions is not None and self.branch_share is None:
            raise ValueError(f"--versions {self.versions}: give --branch-share too")
        if self.versions is not None and self.versions < 1:
            raise ValueError(f"--versions {self.versions}: must be at least 1")
        if self.branch_share is not None and not 0 < self.branch_share < 1:
            raise ValueError(f"--branch-share {self.branch_share}: must lie between 0 and 1")

    def lay_out(self, plan: Plan) -> MainPath | None:
        """Return the main path of a run; None where the run is none. ValueError names the flag where the steps cannot
        be divided."""
        if self.branch_share is None:
            return None
        if self.versions is None:
            return MainPath.ending([segment.end_step for segment in plan.segments], self.branch_share)
        if len(plan.segments) > 1:
            raise ValueError(
                f"--versions {self.versions}: the run has {len(plan.segments)} segments, each of which is a version; "
                "give --branch-share alone"
            )
        return MainPath.of(plan.total_steps, self.versions, self.branch_share)


def check_main_path(path: MainPath, plan: Plan, rate: LearningRate) -> None:
    """ValueError names the flag where a version could not leave the main path and end where it should."""
    for point in path.branch_points:
        if rate(point - 1) != rate.config.lr:
            doing = "still warms up" if point < rate.warmup else f"has decayed to {rate(point - 1):g}"
            raise ValueError(
                f"--branch-share: a version leaves after step {point}, where the learning rate {doing}; a "
                "main path stays at --lr once it is warm, as with --lr-decay-style constant"
            )
    if path.versions > len(plan.segments) and not _may_end_anywhere(plan):
        raise ValueError(
            f"--versions {path.versions}: the versions before the last end earlier, and phases, orders and weights "
            "follow a run's length, except where one Learn without weights is all, its length given for the run: give "
            "--lfr-schedule uniform"
        )


def _may_end_anywhere(plan: Plan) -> bool:
    """Whether a run has the same order however long it is: one Learn in shares, without a replay or weights of
    corpora."""
    first = plan.phases[0]
    is_learn = first.phase.kind == "learn" and first.phase.unit == "share" and not first.phase.replay
    return len(plan.phases) == 1 and is_learn and plan.segments[-1].blend.weights is None

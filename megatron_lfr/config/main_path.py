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
    """With --versions: the share of a version's steps that its branch has, which ends where the version does."""

    def validate(self) -> None:
        """ValueError names the flag and the legal values."""
        if (self.versions is None) != (self.branch_share is None):
            raise ValueError("--versions and --branch-share: go together")
        if self.versions is not None and self.versions < 1:
            raise ValueError(f"--versions {self.versions}: must be at least 1")
        if self.branch_share is not None and not 0 < self.branch_share < 1:
            raise ValueError(f"--branch-share {self.branch_share}: must lie between 0 and 1")

    def lay_out(self, total_steps: int) -> MainPath | None:
        """Return the main path of a run of `total_steps`; None where the run is none. ValueError names the flag where
        the steps cannot be divided."""
        if self.versions is None or self.branch_share is None:
            return None
        return MainPath.of(total_steps, self.versions, self.branch_share)


def check_main_path(path: MainPath, plan: Plan, rate: LearningRate) -> None:
    """ValueError names the flag where a version could not leave the main path and end where it should."""
    for point in path.branch_points:
        if rate(point - 1) != rate.config.lr:
            doing = "still warms up" if point < rate.warmup else f"has decayed to {rate(point - 1):g}"
            raise ValueError(
                f"--versions {path.versions}: a version leaves after step {point}, where the learning rate {doing}; a "
                "main path stays at --lr once it is warm, as with --lr-decay-style constant"
            )
    if path.versions > 1 and (len(plan.phases) > 1 or plan.segments[-1].blend.weights is not None):
        raise ValueError(
            f"--versions {path.versions}: the versions before the last end earlier, and phases, orders and weights "
            "follow a run's length, except where one Learn without weights is all: give --lfr-schedule uniform"
        )

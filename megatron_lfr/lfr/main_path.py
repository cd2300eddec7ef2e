"""A main path and its branches: where each version of a model leaves, and where it ends (arXiv 2410.04103).

The paper has a main path at the maximal learning rate, and for each version a branch that leaves it and decays
completely. Its tables and code were not at hand: the formulas are ours, made to agree with its figure and with its
58 % of the cost of training four versions from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise


def branch_steps(version_steps: int, branch_share: float) -> int:
    """Return the steps of the branch of a version that has `version_steps` steps of new data: the share of them,
    rounded to the nearest step, a half upwards. The share counts as the decimal number that it prints as.

    ValueError where the branch has no step, or none is left for the main path.
    """
    share = Fraction(str(branch_share))
    steps = math.floor(share * version_steps + Fraction(1, 2))
    if not 0 < steps < version_steps:
        raise ValueError(
            f"--branch-share {branch_share:g}: of a version's {version_steps} steps, a branch would have {steps}; "
            f"from 1 to {version_steps - 1} are possible"
        )
    return steps


@dataclass(frozen=True)
class MainPath:
    """Versions 1, 2, ... of a model. Each ends after a step of `ends`; its last `branches` steps are those of a branch,
    which leaves the main path before them."""

    ends: tuple[int, ...]
    branches: tuple[int, ...]

    @staticmethod
    def of(total_steps: int, versions: int, branch_share: float) -> MainPath:
        """Divide the steps of the last version among all. ValueError names the flag where they cannot be."""
        if total_steps % versions:
            raise ValueError(
                f"--versions {versions}: must divide the run's {total_steps} steps, of which each version adds as many"
            )
        steps = total_steps // versions
        return MainPath.ending([steps * version for version in range(1, versions + 1)], branch_share)

    @staticmethod
    def ending(ends: Sequence[int], branch_share: float) -> MainPath:
        """Return the main path of versions that end after these steps, which ascend. ValueError names the flag where
        one of them would have no branch."""
        lengths = [end - before for before, end in pairwise([0, *ends])]
        return MainPath(tuple(ends), tuple(branch_steps(length, branch_share) for length in lengths))

    @property
    def versions(self) -> int:
        return len(self.ends)

    def first(self, versions: int) -> MainPath:
        """Return the main path of the first versions alone."""
        return MainPath(self.ends[:versions], self.branches[:versions])

    def leaves_after(self, version: int) -> int:
        """Return the step after which a version leaves the main path."""
        return self.ends_after(version) - self.branches[version - 1]

    def ends_after(self, version: int) -> int:
        """Return the last step of a version. ValueError for a version that the main path does not have."""
        if not 1 <= version <= self.versions:
            raise ValueError(f"--version {version}: the main path has versions 1 to {self.versions}")
        return self.ends[version - 1]

    @property
    def branch_points(self) -> list[int]:
        """The steps after which versions leave."""
        return [self.leaves_after(version) for version in range(1, self.versions + 1)]

    @property
    def end(self) -> int:
        """The step after which the last version leaves: what comes then on the main path, no version needs."""
        return self.leaves_after(self.versions)

    def path_switching_steps(self, to_the_end: bool = False) -> int:
        """Return the steps of the main path and all branches. to_the_end: of a main path that goes on to the last
        version's end instead of ending where that leaves."""
        return (self.ends[-1] if to_the_end else self.end) + sum(self.branches)

    @property
    def from_scratch_steps(self) -> int:
        """The steps of training each version from scratch, on all data so far."""
        return sum(self.ends)

    @property
    def continual_steps(self) -> int:
        """The steps of training each version from the one before, on the new data."""
        return self.ends[-1]

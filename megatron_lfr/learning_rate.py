"""The learning rate of every step of a run: one function of the settings, the run's length and its batch size."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Decay = Literal["linear", "cosine", "exponential", "minus_sqrt", "knee", "multi-step"]
"""Shapes of a decay from the peak to the end of a stretch of training."""

_CLOSE = 1e-9
"""Relative difference of two rates that are the same, but for the rounding of a length in steps."""


@dataclass(frozen=True)
class LearningRateConfig:
    """One learning-rate schedule over the entire run; phases do not warm it up again."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD", "inverse-square-root", "knee", "multi-step"] = (
        "cosine"
    )
    """Shape of the learning rate's decay. WSD (warm-up, stable, decay) holds the peak and decays at the end; knee holds
    it for --lr-knee-explore of the decay's steps and then falls on a straight line; multi-step falls in the steps of
    --lr-step-shares."""
    lr_decay_iters: int | None = None
    """Steps until the decay is complete; by default the run's total."""
    lr_decay_samples: int | None = None
    """Samples (visits of blocks) until the decay is complete, instead of --lr-decay-iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from --lr-warmup-init."""
    lr_warmup_samples: int = 0
    """Samples (visits of blocks) of linear warm-up from --lr-warmup-init, instead of --lr-warmup-iters."""
    lr_warmup_fraction: float | None = None
    """Length of the linear warm-up as a share of the decay's steps, instead of --lr-warmup-iters."""
    lr_warmup_init: float = 0.0
    """Learning rate that the warm-up starts from."""
    lr_wsd_decay_style: Decay = "exponential"
    """Shape of the decay at the end of --lr-decay-style WSD."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of --lr-decay-style WSD; by default a tenth of the run."""
    lr_wsd_decay_samples: int | None = None
    """Samples (visits of blocks) of the decay at the end of --lr-decay-style WSD, instead of --lr-wsd-decay-iters."""
    lr_knee_explore: float = 0.5
    """Share of a knee decay that holds the peak before the learning rate falls."""
    lr_step_shares: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """Shares of a multi-step decay after which the learning rate falls to the next of --lr-step-factors."""
    lr_step_factors: list[float] = field(default_factory=lambda: [0.316, 0.1])
    """What a multi-step decay multiplies the peak learning rate with, after each of --lr-step-shares; --min-lr remains
    the lowest rate."""
    override_opt_param_scheduler: bool = False
    """Allow a longer run whose learning rate depends on its length, such as a cosine: the steps to come have the rate
    of the longer run, while those before were trained with that of the shorter one. Without it, that is refused."""

    def validate(self) -> None:
        """ValueError names the flag and the legal values."""
        if self.lr <= 0:
            raise ValueError(f"--lr {self.lr}: must be positive")
        for flag, rate in (("--min-lr", self.min_lr), ("--lr-warmup-init", self.lr_warmup_init)):
            if not 0 <= rate <= self.lr:
                raise ValueError(f"{flag} {rate}: must lie between 0 and --lr {self.lr}")
        for name in ("lr_warmup_iters", "lr_warmup_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: must not be negative")
        for name in ("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            decay = getattr(self, name)
            if decay is not None and decay < 1:
                raise ValueError(f"{_flag(name)} {decay}: must be at least 1")
        if sum(map(bool, (self.lr_warmup_iters, self.lr_warmup_samples, self.lr_warmup_fraction))) > 1:
            raise ValueError("give one of --lr-warmup-iters, --lr-warmup-samples and --lr-warmup-fraction")
        if self.lr_decay_iters and self.lr_decay_samples:
            raise ValueError("give one of --lr-decay-iters and --lr-decay-samples")
        if self.lr_wsd_decay_iters and self.lr_wsd_decay_samples:
            raise ValueError("give one of --lr-wsd-decay-iters and --lr-wsd-decay-samples")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            raise ValueError(f"--lr-warmup-fraction {self.lr_warmup_fraction}: must lie between 0 and 1")
        self._validate_shapes()

    def _validate_shapes(self) -> None:
        if not 0 <= self.lr_knee_explore < 1:
            raise ValueError(f"--lr-knee-explore {self.lr_knee_explore}: must be at least 0 and below 1")
        shares, factors = self.lr_step_shares, self.lr_step_factors
        if not shares or len(shares) != len(factors):
            raise ValueError(
                f"--lr-step-shares: {len(shares)} of them, but {len(factors)} of --lr-step-factors; give equally many"
            )
        if shares != sorted(set(shares)) or not (shares[0] >= 0 and shares[-1] < 1):
            raise ValueError(f"--lr-step-shares {_words(shares)}: must ascend, from 0 on and below 1")
        if factors != sorted(factors, reverse=True) or not (factors[0] <= 1 and factors[-1] >= 0):
            raise ValueError(f"--lr-step-factors {_words(factors)}: must not ascend, from at most 1 to at least 0")


class LearningRate:
    """Gives the learning rate of each step: linear warm-up to `lr`, then `lr_decay_style` down to `min_lr`.

    Step k (from 0) of a warm-up of w steps from init has init + (lr - init)·(k+1)/w, so that the first step already
    moves and the last step of the decay is at `min_lr` (Megatron-LM is one step behind). Skipped steps count, while
    Megatron-LM would not advance the rate. Lengths in samples may be fractions of a step. ValueError where warm-up and
    decay do not fit.
    """

    def __init__(self, config: LearningRateConfig, total_steps: int, global_batch_size: int) -> None:
        self.config = config
        self.decay_steps: float = config.lr_decay_iters or total_steps
        if config.lr_decay_samples:
            self.decay_steps = config.lr_decay_samples / global_batch_size
        self.warmup: float = config.lr_warmup_iters or config.lr_warmup_samples / global_batch_size
        if config.lr_warmup_fraction:
            self.warmup = config.lr_warmup_fraction * self.decay_steps
        if self.warmup > self.decay_steps:
            samples = config.lr_warmup_samples
            given = f"samples {samples}: {self.warmup:g} steps, " if samples else f"iters {config.lr_warmup_iters}: "
            raise ValueError(f"--lr-warmup-{given}longer than the decay's {self.decay_steps:g} steps")
        self.span = self.decay_steps - self.warmup
        self.style: str = config.lr_decay_style
        if config.lr_decay_style == "WSD":
            length: float = config.lr_wsd_decay_iters or max(1.0, self.decay_steps // 10)
            if config.lr_wsd_decay_samples:
                length = config.lr_wsd_decay_samples / global_batch_size
            if length > self.span:
                blocks = config.lr_wsd_decay_samples
                given = f"samples {blocks}: {length:g} steps, " if blocks else f"iters {length:g}: "
                raise ValueError(
                    f"--lr-wsd-decay-{given}longer than the decay's {self.decay_steps:g} steps less "
                    f"{self.warmup:g} of warm-up"
                )
            self.span, self.style = length, config.lr_wsd_decay_style

    def __call__(self, step: int) -> float:
        config, done = self.config, step + 1
        if done < self.warmup:
            return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * done / self.warmup
        if self.style == "constant":
            return config.lr
        if self.style == "inverse-square-root":
            return max(config.min_lr, config.lr * math.sqrt(max(self.warmup, 1.0) / done))
        progress = 1.0 - (self.decay_steps - done) / self.span if self.span else 1.0
        progress = min(max(progress, 0.0), 1.0)
        if self.style == "multi-step":
            return max(config.min_lr, config.lr * self._factor(progress))
        return config.min_lr + (config.lr - config.min_lr) * self._remaining(progress)

    def _remaining(self, progress: float) -> float:
        """Return the share of the way from `lr` to `min_lr` that is left: 1 at progress 0, 0 at progress 1.

        The first four formulas are Megatron-LM's. knee is the Knee schedule of arXiv 2003.03977: constant while it
        explores, then linear.
        """
        match self.style:
            case "linear":
                return 1.0 - progress
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case "exponential":
                return 2.0 * math.pow(0.5, progress) - 1.0
            case "minus_sqrt":
                return 1.0 - math.sqrt(progress)
            case _:  # knee
                return min(1.0, (1.0 - progress) / (1.0 - self.config.lr_knee_explore))

    def _factor(self, progress: float) -> float:
        """Return the factor of a multi-step decay: that of the last share that is behind, as in arXiv 2401.02954."""
        # The first step after a share has its factor: step k of n is at progress (k+1)/n, and has k/n behind it.
        passed = bisect.bisect_left(self.config.lr_step_shares, progress - 1e-12)
        return self.config.lr_step_factors[passed - 1] if passed else 1.0


class Lengths(Protocol):
    """The lengths of a run that the learning rate of its steps depends on; a plan has them."""

    @property
    def total_steps(self) -> int: ...
    @property
    def total_samples(self) -> int: ...
    @property
    def batch_sizes(self) -> list[int]: ...
    def samples_before(self, step: int) -> int: ...


class _BySamples(LearningRate):
    """The learning rate of a run with several batch sizes, whose lengths are given in samples: each step has that of
    the samples until its end, as in Megatron-LM."""

    def __init__(self, config: LearningRateConfig, lengths: Lengths) -> None:
        super().__init__(config, lengths.total_samples, 1)
        self._lengths = lengths

    def __call__(self, step: int) -> float:
        return super().__call__(self._lengths.samples_before(step + 1) - 1)


def make_learning_rate(config: LearningRateConfig, lengths: Lengths) -> LearningRate:
    """Return the learning rate of each step of a run. ValueError where lengths in samples and in steps go with several
    batch sizes."""
    sizes = lengths.batch_sizes
    if len(sizes) == 1:
        return LearningRate(config, lengths.total_steps, sizes[0])
    in_samples, in_steps = (
        [name for name in ("lr_warmup", "lr_decay", "lr_wsd_decay") if getattr(config, f"{name}_{unit}")]
        for unit in ("samples", "iters")
    )
    if in_samples and in_steps:
        flags = _flag(f"{in_samples[0]}_samples"), _flag(f"{in_steps[0]}_iters")
        raise ValueError(f"{flags[0]} and {flags[1]}: the batch size changes; give both in samples, or both in steps")
    return _BySamples(config, lengths) if in_samples else LearningRate(config, lengths.total_steps, sizes[-1])


def learning_rate_of(settings: Mapping[str, Any], lengths: Lengths) -> LearningRate:
    """Return the learning rate of a run with these settings, which may be those of an earlier version. ValueError or
    TypeError where they are no settings of a learning rate."""
    names = [one.name for one in dataclasses.fields(LearningRateConfig)]
    config = LearningRateConfig(**{name: settings[name] for name in names if name in settings})
    config.validate()
    return make_learning_rate(config, lengths)


def first_difference(before: LearningRate, after: LearningRate, steps: int) -> int | None:
    """Return the first of `steps` steps, from 0, that has another rate in `after` than in `before`; None where all have
    the same, but for rounding."""
    return next((k for k in range(steps) if abs(before(k) - after(k)) > _CLOSE * before(k)), None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(values: list[float]) -> str:
    return " ".join(map(str, values))

"""LoRA-RITE (Yen et al. 2024, https://arxiv.org/abs/2410.20625): steps of the factors of Z = A Bᵀ that do not depend on
how Z is factored: of (A Q, B Q⁻ᵀ) they make the same Z, for any invertible Q.

All tensors are of k pairs of the same shapes: A [k, m, r], B [k, n, r]. A step of A is computed in an orthonormal basis
of B's columns, and a step of B in one of A's; both are those of the pair before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RiteConfig:
    """What a step of LoRA-RITE depends on beside the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    """Is added to the roots of the second moment's eigenvalues."""
    relative_eps: bool = False
    """Whether eps is a share of the largest such root of the factor."""
    clip: float = 1.0
    """Largest norm of the unmagnified gradients of all factors together; 0 sets no bound."""
    escape: bool = True
    """Whether what a basis loses of the second moment is remembered."""
    weight_decay: float = 0.0


@dataclass
class FactorState:
    """State of one factor of k pairs, [k, rows, r]."""

    momentum: Tensor
    """First moment of the preconditioned gradients, in `basis`: [k, rows, r]."""
    second_moment: Tensor
    """In `basis`: [k, r, r]."""
    escaped: Tensor
    """Bound on the second moment outside of `basis`: [k]."""
    basis: Tensor
    """Orthonormal columns that span those of the other factor: [k, other rows, r]. Zero before the first step."""

    @classmethod
    def zeros(cls, factor: Tensor, other: Tensor) -> FactorState:
        """Make the state before the first step of `factor`."""
        pairs, _, rank = factor.shape
        return cls(
            torch.zeros_like(factor),
            factor.new_zeros(pairs, rank, rank),
            factor.new_zeros(pairs),
            torch.zeros_like(other),
        )

    def replace(self, new: FactorState, where: Tensor) -> None:
        """Take over another state, in place, if the scalar `where` is true."""
        for field in fields(self):
            old = getattr(self, field.name)
            old.copy_(torch.where(where, getattr(new, field.name), old))


@dataclass(frozen=True)
class Unmagnified:
    """A factor's gradient in an orthonormal basis of the other factor's columns."""

    gradient: Tensor
    """[k, rows, r]."""
    basis: Tensor
    """[k, other rows, r]."""
    inverse: Tensor
    """R⁻¹ [k, r, r] where the other factor is basis · R; the pseudo-inverse where that is singular."""


def unmagnify(gradient: Tensor, other: Tensor) -> Unmagnified:
    """Return a factor's gradient without the magnitude of the other factor."""
    basis, triangle = torch.linalg.qr(other)
    inverse = torch.linalg.pinv(triangle)
    return Unmagnified(gradient @ inverse, basis, inverse)


def precondition(state: FactorState, given: Unmagnified, step: Tensor, config: RiteConfig) -> FactorState:
    """Return the state after a step, of which the momentum is the direction of the step. step: a scalar, from 0."""
    gradient = given.gradient
    beta1, beta2 = (corrected_decay(beta, step).to(gradient.dtype) for beta in (config.beta1, config.beta2))
    change = given.basis.mT @ state.basis  # [k, r, r]
    carried = change @ state.second_moment @ change.mT
    escaped = torch.zeros_like(state.escaped)
    if config.escape:
        escaped = beta2 * (state.escaped + _escaped_mass(state.second_moment, carried))
    second_moment = beta2 * carried + (1 - beta2) * (gradient.mT @ gradient) / gradient.shape[-2]
    direction = gradient @ _inverse_root(second_moment, escaped, config)
    momentum = beta1 * state.momentum @ change.mT + (1 - beta1) * direction
    return FactorState(momentum, second_moment, escaped, given.basis)


def corrected_decay(beta: float, step: Tensor) -> Tensor:
    """Return the decay of a mean at `step` (from 0), whose weights then have the sum 1: β (1 − βᵗ) / (1 − βᵗ⁺¹)."""
    t = step.double()
    decay: Tensor = beta * (1 - beta**t) / (1 - beta ** (t + 1))
    return decay


class LoRARite:
    """Takes steps of pairs of factors, which are grouped by their shapes.

    pairs: (A, B) of each group, fp32 [k, m, r] and [k, n, r], only the shapes of which count here. sum_over_stages:
    adds up the squared norms of the ranks that hold other pairs.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        config: RiteConfig,
        sum_over_stages: Callable[[Tensor], Tensor] = lambda squares: squares,
    ) -> None:
        self.config, self._sum_over_stages = config, sum_over_stages
        self.states = [(FactorState.zeros(a, b), FactorState.zeros(b, a)) for a, b in pairs]
        self.step_count = torch.zeros((), dtype=torch.float32, device=pairs[0][0].device)

    @torch.no_grad()
    def step(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        gradients: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        skipped: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the factors after a step. If the scalar `skipped` is 1, they and the state stay as they were."""
        takes = torch.ones_like(self.step_count, dtype=torch.bool) if skipped is None else skipped == 0
        # What is not finite would end the decompositions with an error.
        finite = [
            [torch.where(takes, tensor, 0.0) for tensor in (*pair, *both)]
            for pair, both in zip(pairs, gradients, strict=True)
        ]
        given = [(unmagnify(grad_a, b), unmagnify(grad_b, a)) for a, b, grad_a, grad_b in finite]
        factor = self._clip([one for both in given for one in both])
        stepped = []
        for pair, states, both in zip(pairs, self.states, given, strict=True):
            new = [self._update(*each, factor, lr, takes) for each in zip(pair, states, both, strict=True)]
            stepped.append((new[0], new[1]))
        self.step_count += takes
        return stepped

    def _clip(self, given: Sequence[Unmagnified]) -> Tensor:
        """Return the factor that brings the norm of all gradients below the bound."""
        squares = torch.stack([one.gradient.double().square().sum() for one in given]).sum()
        if not self.config.clip:
            return torch.ones_like(squares)
        return (self.config.clip / self._sum_over_stages(squares).sqrt()).clamp(max=1.0)

    def _update(
        self, weight: Tensor, state: FactorState, given: Unmagnified, factor: Tensor, lr: float, takes: Tensor
    ) -> Tensor:
        clipped = Unmagnified(given.gradient * factor.to(weight.dtype), given.basis, given.inverse)
        new = precondition(state, clipped, self.step_count, self.config)
        stepped = weight - lr * self.config.weight_decay * weight - lr * new.momentum @ given.inverse.mT
        state.replace(new, takes)
        return torch.where(takes, stepped, weight)


def _escaped_mass(before: Tensor, after: Tensor) -> Tensor:
    """Bound what a change of basis has lost of the second moment, in any direction: [k, r, r] → [k]."""
    loss = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)
    traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (before, after)]
    return torch.minimum(loss.amax(-1).clamp(min=0), (traces[0] - traces[1]).clamp(min=0))


def _inverse_root(second_moment: Tensor, escaped: Tensor, config: RiteConfig) -> Tensor:
    """Return (V + ρ I)^(-1/2) of each matrix V. Eigenvalues that rounding makes negative count as 0."""
    values, vectors = torch.linalg.eigh(second_moment)
    roots = (values.clamp(min=0) + escaped[:, None]).sqrt()
    eps = config.eps * roots.amax(-1, keepdim=True) if config.relative_eps else config.eps
    inverse = 1 / (roots + eps)
    if config.relative_eps:  # where all is 0
        inverse = torch.where(roots > 0, inverse, 0.0)
    root: Tensor = (vectors * inverse[:, None]) @ vectors.mT
    return root

"""LoRA-RITE in fp64 NumPy, pair by pair, written from the formulas of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Pair = tuple[Matrix, Matrix]


@dataclass
class RiteOracle:
    """Steps of pairs (A [m, r], B [n, r]) of Z = A Bᵀ. rcond: singular values below this share of the largest count as
    zero."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    relative_eps: bool = False
    clip: float = 1.0
    escape: bool = True
    weight_decay: float = 0.0
    rcond: float = 1e-14

    def __post_init__(self) -> None:
        self.t = 0
        self.moments: dict[tuple[int, int], tuple[Matrix, Matrix, float, Matrix]] = {}

    def step(self, pairs: Sequence[Pair], gradients: Sequence[Pair], lr: float) -> list[Pair]:
        """Return the pairs after a step, given the gradients of both factors of each."""
        given = {}
        for number, (pair, both) in enumerate(zip(pairs, gradients, strict=True)):
            for side in range(2):
                u, r = np.linalg.qr(pair[1 - side])
                given[number, side] = both[side] @ np.linalg.pinv(r, rcond=self.rcond), u, r
        norm = np.sqrt(sum((g**2).sum() for g, _, _ in given.values()))
        factor = self.clip / norm if self.clip and norm > self.clip else 1.0
        new: list[Pair] = []
        for number, pair in enumerate(pairs):
            updated = []
            for side in range(2):
                g, u, r = given[number, side]
                momentum = self._moments((number, side), factor * g, u)
                step = momentum @ np.linalg.pinv(r, rcond=self.rcond).T
                updated.append(pair[side] - lr * step - lr * self.weight_decay * pair[side])
            new.append((updated[0], updated[1]))
        self.t += 1
        return new

    def _moments(self, key: tuple[int, int], g: Matrix, u: Matrix) -> Matrix:
        rank, t = g.shape[1], self.t
        m, v, rho, old_u = self.moments.get(key, (np.zeros_like(g), np.zeros((rank, rank)), 0.0, np.zeros_like(u)))
        beta1, beta2 = (b * (1 - b**t) / (1 - b ** (t + 1)) for b in (self.beta1, self.beta2))
        p = u.T @ old_u
        carried = p @ v @ p.T
        lost = max(0.0, float((np.linalg.eigvalsh(v) - np.linalg.eigvalsh(carried)).max()))
        rho = beta2 * (rho + min(lost, max(0.0, float(np.trace(v) - np.trace(carried))))) if self.escape else 0.0
        v = beta2 * carried + (1 - beta2) * g.T @ g / len(g)
        values, vectors = np.linalg.eigh(v)
        roots = np.sqrt(np.maximum(values, 0) + rho)
        eps = self.eps * roots.max() if self.relative_eps else self.eps
        s = g @ vectors @ np.diag(1 / np.maximum(roots + eps, 1e-300)) @ vectors.T
        m = beta1 * m @ p.T + (1 - beta1) * s
        self.moments[key] = m, v, rho, u
        return m

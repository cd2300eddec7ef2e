"""LoRA-RITE: against a plain oracle, and what its steps must not depend on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lfr.engine.lora_rite import LoRARite, RiteConfig, corrected_decay
from support.rite_oracle import RiteOracle

OUTPUTS, INPUTS, RANK = 24, 17, 4
Pair = tuple[Tensor, Tensor]


class Task:
    """Fit Z = A Bᵀ to a matrix, of which each step sees another noisy, badly scaled projection."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.dtype = dtype
        self.target = self.normal(OUTPUTS, INPUTS)
        self.rows = torch.logspace(-2, 0, OUTPUTS, dtype=torch.float64)[:, None]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def start(self, rank: int = RANK) -> Pair:
        a, b = 0.5 * self.normal(OUTPUTS, rank), 0.5 * self.normal(INPUTS, rank)
        return a.to(self.dtype), b.to(self.dtype)

    def gradients(self, pair: Pair, number: int) -> Pair:
        """Gradients of both factors, computed in their dtype, of the loss of one step."""
        generator = torch.Generator().manual_seed(1000 + number)
        seen = torch.randn(INPUTS, 8, generator=generator, dtype=torch.float64).to(self.dtype)
        a, b = (factor.clone().requires_grad_() for factor in pair)
        residual = (a @ (b.mT @ seen) - (self.target.to(self.dtype) @ seen)) * self.rows.to(self.dtype)
        grads = torch.autograd.grad(residual.square().mean(), (a, b))
        return grads[0], grads[1]

    def loss(self, pair: Pair) -> float:
        return float(((pair[0] @ pair[1].mT).double() - self.target).mul(self.rows).square().mean())


def train(task: Task, pair: Pair, steps: int, config: RiteConfig | None = None, lr: float = 1e-2) -> list[Tensor]:
    """Return Z after each step, and leave the last pair in `task.last`."""
    stacked = [(pair[0][None], pair[1][None])]
    rite, path = LoRARite(stacked, config or RiteConfig()), []
    for number in range(steps):
        a, b = task.gradients((stacked[0][0][0], stacked[0][1][0]), number)
        stacked = rite.step(stacked, [(a[None], b[None])], lr)
        path.append((stacked[0][0] @ stacked[0][1].mT)[0].double())
    task.last = stacked[0][0][0], stacked[0][1][0]  # type: ignore[attr-defined]
    return path


def distance(path: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference over the steps, as a share of what is there."""
    return max(float((z - y).norm() / y.norm()) for z, y in zip(path, other, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        RiteConfig(),
        RiteConfig(clip=0.02, weight_decay=0.3),
        RiteConfig(clip=0.0, escape=False, beta1=0.5, beta2=0.9),
        RiteConfig(relative_eps=True, eps=1e-2, beta2=0.95),
    ],
    ids=["defaults", "clip and decay", "no escape", "relative"],
)
@pytest.mark.parametrize("start", ["full rank", "B zero", "B of rank 2"])
def test_equals_the_oracle(config: RiteConfig, start: str) -> None:
    """Two groups, one of two pairs and one with other shapes, whose gradients are clipped together."""
    task = Task()
    groups = [[task.start(), task.start()], [(task.normal(7, 3), task.normal(9, 3))]]
    for group in groups:
        for number, (a, b) in enumerate(group):
            if start != "full rank":
                kept = torch.tensor([1.0, 1, 0, 0] if start == "B of rank 2" else [0.0] * 4, dtype=torch.float64)
                group[number] = a, b * kept[: b.shape[1]]
    stacked = [tuple(torch.stack(sides) for sides in zip(*group, strict=True)) for group in groups]
    pairs = [(a.numpy(), b.numpy()) for group in groups for a, b in group]
    oracle = RiteOracle(**dataclasses.asdict(config), rcond=4 * 2.3e-16)
    rite = LoRARite(stacked, config)  # type: ignore[arg-type]
    for _ in range(12):
        gradients = []
        for a, b in pairs:
            g = task.normal(len(a), len(b)).numpy() * 0.1
            gradients.append((g @ b, g.T @ a))
        tensors = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in gradients]
        grouped = [[tensors[0], tensors[1]], [tensors[2]]]
        stacked = rite.step(  # type: ignore[assignment]
            stacked,  # type: ignore[arg-type]
            [tuple(torch.stack(sides) for sides in zip(*group, strict=True)) for group in grouped],  # type: ignore[misc]
            0.05,
        )
        pairs = oracle.step(pairs, gradients, 0.05)
        ours = [(a[k], b[k]) for a, b in stacked for k in range(len(a))]
        for pair, expected in zip(ours, pairs, strict=True):
            for factor, wanted in zip(pair, expected, strict=True):
                np.testing.assert_allclose(factor.numpy(), wanted, rtol=1e-8, atol=1e-9)


def orthogonal(task: Task, size: int = RANK) -> Tensor:
    return torch.linalg.qr(task.normal(size, size))[0]


def general(task: Task, condition: float) -> Tensor:
    return orthogonal(task) @ torch.diag(torch.logspace(0, np.log10(condition), RANK).double()) @ orthogonal(task)


TRANSFORMATIONS: dict[str, Callable[[Task], Tensor]] = {
    "scalar": lambda task: 100.0 * torch.eye(RANK, dtype=torch.float64),
    "diagonal": lambda task: torch.diag(torch.tensor([1e-2, 1, 30, 1e2], dtype=torch.float64)),
    "orthogonal": orthogonal,
    "general, condition 100": lambda task: general(task, 1e2),
    "general, condition 10000": lambda task: general(task, 1e4),
}
ROUNDED = 4e-3
"""In fp32, of factors of condition 1e4: one rounding of such factors moves Z by 1e-4, and each step rounds them."""


DECAYING = RiteConfig(weight_decay=0.1)


@functools.cache
def reference(dtype: torch.dtype) -> list[Tensor]:
    """Train the factors as they are."""
    task = Task(dtype)
    return train(task, task.start(), 200, DECAYING)


@pytest.mark.parametrize("kind", TRANSFORMATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_steps_do_not_depend_on_the_factors(kind: str, dtype: torch.dtype, bound: float) -> None:
    task = Task(dtype)
    a, b = (factor.double() for factor in task.start())
    q = TRANSFORMATIONS[kind](task)
    other = (a @ q).to(dtype), (b @ torch.linalg.inv(q).mT).to(dtype)
    if kind.endswith("10000") and dtype == torch.float32:
        bound = ROUNDED
    path = reference(dtype)
    assert distance(train(task, other, 200, DECAYING), path) < bound
    assert distance(path[:1] * 199, path[1:]) > 0.3  # it goes somewhere


def test_a_waits_for_b() -> None:
    task = Task(torch.float32)
    a, b = task.start()
    stacked = [(a[None], torch.zeros_like(b)[None])]
    rite = LoRARite(stacked, RiteConfig())
    grads = task.gradients((a, torch.zeros_like(b)), 0)
    stepped = rite.step(stacked, [(grads[0][None], grads[1][None])], 1e-2)
    assert torch.equal(stepped[0][0][0], a)
    assert torch.linalg.matrix_rank(stepped[0][1][0]) == RANK
    grads = task.gradients((stepped[0][0][0], stepped[0][1][0]), 1)
    again = rite.step(stepped, [(grads[0][None], grads[1][None])], 1e-2)
    assert (again[0][0] - stepped[0][0]).norm() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_b_of_lower_rank_trains_on(dtype: torch.dtype) -> None:
    """As the eigenvalues of a second moment of lower rank are not clamped, half of them are below 0."""
    task = Task(dtype)
    a, b = task.start()
    b = b @ torch.diag(torch.tensor([1, 1, 0, 0], dtype=dtype))
    path = train(task, (a, b), 400)
    assert all(torch.isfinite(z).all() for z in path)
    assert task.loss(task.last) < 0.3 * task.loss((a, b))  # type: ignore[attr-defined]


def test_the_final_loss_does_not_depend_on_the_scale_of_a_as_adamw_s_does() -> None:
    rite, adamw = [], []
    for scale in (0.03, 1.0, 30.0):
        task = Task(torch.float32)
        a, b = task.start()
        pair = (a * scale, b / scale)
        train(task, pair, 300)
        rite.append(task.loss(task.last))  # type: ignore[attr-defined]
        weights = [torch.nn.Parameter(factor.clone()) for factor in pair]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        for number in range(300):
            weights[0].grad, weights[1].grad = task.gradients((weights[0].detach(), weights[1].detach()), number)
            optimizer.step()
        adamw.append(task.loss((weights[0].detach(), weights[1].detach())))
    assert max(rite) / min(rite) < 1.001
    assert max(adamw) / min(adamw) > 1.5


def test_a_skipped_step_changes_nothing() -> None:
    task = Task(torch.float32)
    stacked = [(a[None], b[None]) for a, b in (task.start(), task.start())]
    rite = LoRARite(stacked, RiteConfig())
    gradients = [tuple(grad[None] for grad in task.gradients((a[0], b[0]), 0)) for a, b in stacked]
    stacked = rite.step(stacked, gradients, 1e-2)  # type: ignore[arg-type]
    before = [tensor.clone() for states in rite.states for state in states for tensor in vars(state).values()]
    spoilt = [(a * torch.nan, b * torch.inf) for a, b in gradients]
    skipped = rite.step(stacked, spoilt, 1e-2, torch.ones(()))
    after = [tensor for states in rite.states for state in states for tensor in vars(state).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(old[i], new[i]) for old, new in zip(stacked, skipped, strict=True) for i in (0, 1))
    assert rite.step_count == 1


def test_means_are_of_all_steps_alike_at_first() -> None:
    """With β near 1, the weights of the steps so far are equal; they sum to 1 for every β."""
    decays = [float(corrected_decay(1 - 1e-9, torch.tensor(float(t)))) for t in range(4)]
    np.testing.assert_allclose(decays, [0, 1 / 2, 2 / 3, 3 / 4], atol=1e-6)
    mean = 0.0
    for t in range(5):
        decay = float(corrected_decay(0.9, torch.tensor(float(t))))
        mean = decay * mean + (1 - decay) * 1.0
    assert mean == pytest.approx(1.0)

"""block_cross_entropy against its definition in fp64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lfr.kernels import block_cross_entropy, scoring
from megatron_lfr.kernels.block_cross_entropy import SAVE_BUDGET_BYTES
from support.cross_entropy_oracle import (
    ALL,
    BOUND,
    CASES,
    PATHS,
    SCORE_PATHS,
    Case,
    call,
    errors,
    make_case,
    oracle,
    packed,
    path,
    run,
    score_errors,
    small_slices,
)


def check(case: Case, bound: float = BOUND, **more: Any) -> None:
    worst = errors(case, run(case, **more), oracle(case))
    assert max(worst) <= bound, worst


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str, way: str) -> None:
    check(CASES[name](), **path(way), chunk_rows=5)


def test_equals_pytorch() -> None:
    case = make_case(ignored=0.3, masked=0.0, label_smoothing=0.2)
    mean = torch.full_like(case.token_weight, 1 / int((case.labels != -100).sum()))
    loss, _ = block_cross_entropy(case.hidden, case.weight, case.labels, mean, label_smoothing=0.2)
    logits = case.hidden @ case.weight.t()
    expected = F.cross_entropy(logits.flatten(0, 1), case.labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


def test_gradients_by_finite_differences() -> None:
    case = make_case(2, 3, 4, 9, torch.float64, vocab_size=7, **ALL)
    for way in ("save", "chunk"):

        def loss(hidden: Tensor, weight: Tensor, way: str = way) -> Tensor:
            return call(hidden, weight, case.labels, case.token_weight, **path(way), chunk_rows=4, **case.options)[0]

        assert torch.autograd.gradcheck(loss, (case.hidden.requires_grad_(), case.weight.requires_grad_()))


@pytest.mark.parametrize("way", PATHS)
def test_very_uneven_logits(way: str) -> None:
    case = make_case(scale=60.0 / 8**0.5, vocab=64, rows=4, length=16)
    result, expected = run(case, **path(way)), oracle(case)
    largest = (case.hidden @ case.weight.t()).abs().max()
    assert (result.nll_sum.double() - expected.nll_sum).abs().max() <= 16 * 2**-19 * largest
    assert max(errors(case, result, expected)) <= 1e-5


@pytest.mark.parametrize("way", PATHS)
def test_confident_tokens_keep_their_gradient(way: str) -> None:
    hidden = torch.tensor([[[9.0], [14.0]]])
    case = Case(hidden, torch.tensor([[1.0], [0.0]]), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    result, expected = run(case, **path(way)), oracle(case)
    torch.testing.assert_close(result.nll_sum.double(), expected.nll_sum, rtol=1e-3, atol=0)
    torch.testing.assert_close(result.d_hidden.double(), expected.d_hidden, rtol=5e-2, atol=0)


def test_uniform_softmax() -> None:
    case = make_case(vocab=32, scale=0.0, masked=0.0, ignored=0.0)
    result = run(case)
    torch.testing.assert_close(result.nll_sum, torch.full((3,), 7 * 3.4657359))
    check(case)


@pytest.mark.parametrize("way", [*PATHS, *SCORE_PATHS])
def test_rows_and_batches_without_a_valid_token(way: str) -> None:
    case = make_case()
    case.labels[1] = -100
    case.token_weight[2] = 0.0
    for everything in (False, True):
        if everything:
            case.labels[:] = -100
        case.hidden.requires_grad_()
        loss, stats = call(case.hidden, case.weight, case.labels, case.token_weight, **path(way), chunk_rows=4)
        assert stats.nll_sum[1:].tolist() == stats.count[1:].tolist() == [0.0, 0.0]
        assert torch.isfinite(loss)
        if way not in SCORE_PATHS:
            (gradient,) = torch.autograd.grad(loss, case.hidden)
            assert not gradient[1:].any()
            assert bool(gradient[0].any()) != everything
        if everything:
            assert loss == 0


def test_an_impossible_prediction_on_a_masked_token_costs_nothing() -> None:
    case = make_case(ignored=0.0, masked=0.0)
    case.token_weight[0, 0] = 0.0
    expected = run(case)
    case.hidden[0, 0] = 3e37  # its logits overflow
    result = block_cross_entropy(case.hidden, case.weight, case.labels, case.token_weight)
    torch.testing.assert_close(result[0], expected.loss)
    torch.testing.assert_close(result[1].nll_sum, expected.nll_sum)


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype, weight_dtype: torch.dtype, way: str) -> None:
    weight_dtype = dtype if weight_dtype == torch.bfloat16 else weight_dtype
    case = make_case(4, 12, vocab=100, width=64, dtype=dtype, weight_dtype=weight_dtype, scale=0.3)
    upstream = 1.0039  # as far as can be from a number of 8 bits
    result, expected = run(case, upstream, **path(way), chunk_rows=10), oracle(case)
    expected.d_hidden *= upstream
    expected.d_weight *= upstream
    assert result.loss.dtype == result.nll_sum.dtype == torch.float32
    assert (result.d_hidden.dtype, result.d_weight.dtype) == (dtype, weight_dtype)
    loss, nll, d_hidden, d_weight, count = errors(case, result, expected)
    assert max(loss, nll, count) <= 2e-6  # the logits are fp32
    # Triton's interpreter truncates to bf16 where a GPU rounds: twice the error, each time.
    truncates = "triton" in way and dtype == torch.bfloat16 and not torch.cuda.is_available()
    assert d_hidden <= (6.4e-3 if truncates else 3.2e-3)
    # PyTorch's path on a CPU rounds only what it returns, the kernels the logits' gradient too, and "save" the product.
    bound = (9.6e-3 if weight_dtype == dtype and "save" in way else 6.4e-3) if truncates else 3.2e-3
    assert d_weight <= (2e-6 if weight_dtype == torch.float32 and "triton" not in way else bound)


def test_many_chunks_lose_nothing_in_the_weights_gradient() -> None:
    case = make_case(8, 64, 16, 50, torch.bfloat16, scale=0.3)
    expected = oracle(case)
    measured = [errors(case, run(case, mode="chunk", chunk_rows=c), expected)[3] for c in (512, 64, 8, 1)]
    assert max(measured) <= min(3.2e-3, 1.05 * measured[0])


@pytest.mark.parametrize("way", PATHS)
def test_the_upstream_gradient_scales(way: str) -> None:
    case = make_case(**ALL)
    one, three = run(case, **path(way)), run(case, upstream=3.0, **path(way))
    torch.testing.assert_close(3 * one.d_hidden, three.d_hidden)
    torch.testing.assert_close(3 * one.d_weight, three.d_weight)


@pytest.mark.parametrize("way", PATHS)
def test_backward_twice_through_a_kept_graph(way: str) -> None:
    case = make_case()
    case.hidden.requires_grad_()
    loss, _ = call(case.hidden, case.weight, case.labels, case.token_weight, **path(way))
    one = torch.autograd.grad(loss, case.hidden, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(loss, case.hidden)[0])


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize(("for_hidden", "for_weight"), [(True, False), (False, True)])
def test_one_gradient_alone(for_hidden: bool, for_weight: bool, way: str) -> None:
    case = make_case(**ALL)
    both = run(case, **path(way), chunk_rows=5)
    hidden, weight = case.hidden.requires_grad_(for_hidden), case.weight.requires_grad_(for_weight)
    call(hidden, weight, case.labels, case.token_weight, **path(way), chunk_rows=5, **case.options)[0].backward()
    assert (hidden.grad is None) != for_hidden
    assert (weight.grad is None) != for_weight
    assert torch.equal(*((hidden.grad, both.d_hidden) if for_hidden else (weight.grad, both.d_weight)))


def test_micro_batches_add_up() -> None:
    case = make_case(rows=6, **ALL)
    complete = run(case)
    for size in (1, 2, 4):
        parts = [
            run(Case(case.hidden[i : i + size], case.weight, case.labels[i : i + size],
                     case.token_weight[i : i + size], case.options))
            for i in range(0, 6, size)
        ]  # fmt: skip
        torch.testing.assert_close(sum(p.loss for p in parts), complete.loss)
        torch.testing.assert_close(torch.cat([p.nll_sum for p in parts]), complete.nll_sum)
        torch.testing.assert_close(torch.cat([p.d_hidden for p in parts]), complete.d_hidden)
        torch.testing.assert_close(sum(p.d_weight for p in parts), complete.d_weight)


def test_block_sums_add_up_to_the_loss() -> None:
    case = make_case(rows=4, length=50)
    case.token_weight = (case.token_weight != 0) / 31
    for options in ({}, packed(4, [0, 3, 77, 77, 130, 200])):
        case.options = options
        result = run(case)
        assert result.nll_sum.double().sum().item() / 31 == pytest.approx(result.loss.item(), rel=1e-6)


@pytest.mark.parametrize("way", [*PATHS, *SCORE_PATHS])
def test_statistics_are_the_pure_likelihood(way: str) -> None:
    case = make_case()

    def statistics(token_weight: Tensor, **options: float) -> list[Tensor]:
        return list(call(case.hidden, case.weight, case.labels, token_weight, **path(way), **options)[1])

    plain = statistics(case.token_weight)
    for other in (
        statistics(case.token_weight, z_loss=0.5),
        statistics(case.token_weight, label_smoothing=0.4),
        statistics(case.token_weight * torch.rand(3, 7).add(0.1)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_statistics_have_no_gradient() -> None:
    case = make_case()
    case.hidden.requires_grad_()
    loss, stats = block_cross_entropy(case.hidden, case.weight, case.labels, case.token_weight)
    assert loss.requires_grad
    for statistic in stats:
        with pytest.raises(RuntimeError, match="does not require grad"):
            statistic.sum().backward()


def test_no_second_derivative() -> None:
    case = make_case()
    case.hidden.requires_grad_()
    loss, _ = block_cross_entropy(case.hidden, case.weight, case.labels, case.token_weight)
    (gradient,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("way", PATHS)
def test_reruns_are_equal_bit_for_bit(way: str) -> None:
    rows, cuts = (8, [0, 700, 701, 2048]) if "triton" not in way or torch.cuda.is_available() else (1, [0, 20, 21, 64])
    case = make_case(rows=rows, length=cuts[-1] // rows, width=64, vocab=500, **packed(rows, cuts), **ALL)
    one, two = (run(case, **path(way), chunk_rows=300) for _ in range(2))
    for name in ("loss", "nll_sum", "count", "d_hidden", "d_weight"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any size of the buffer: a token at a time, ragged parts, all tokens, more than there are."""
    small_slices(scoring, monkeypatch)
    case = CASES[name]()
    expected = oracle(case)
    for rows in (0, 4, case.labels.numel(), 1000):
        measured = score_errors(case, expected, score_buffer_bytes=rows * scoring.SLICE_COLUMNS * 4, **path("score"))
        assert max(measured) <= BOUND


def test_the_score_of_fp64_inputs_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(scoring, monkeypatch)
    case = make_case(dtype=torch.float64, vocab=24, vocab_size=17, **ALL)
    case.hidden.requires_grad_()
    loss, stats = block_cross_entropy(
        case.hidden, case.weight, case.labels, case.token_weight, mode="score", score_buffer_bytes=5 * 8 * 4,
        **case.options,
    )  # fmt: skip
    expected = oracle(case)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.nll_sum, expected.nll_sum, rtol=1e-12, atol=0)


def test_inputs_that_are_not_contiguous() -> None:
    case = make_case(**ALL)
    expected = run(case)
    case.hidden = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    case.weight = case.weight.t().contiguous().t()
    case.labels = case.labels.t().contiguous().t()
    case.token_weight = torch.stack((case.token_weight, case.token_weight), -1)[..., 0]
    assert not any(t.is_contiguous() for t in (case.hidden, case.weight, case.labels, case.token_weight))
    result = run(case)
    torch.testing.assert_close(result.d_hidden, expected.d_hidden)
    torch.testing.assert_close(result.d_weight, expected.d_weight)
    assert torch.equal(result.count, expected.count)


def test_auto_chunks_what_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    case = make_case(4, 64, 8, 100)
    for budget in (SAVE_BUDGET_BYTES, 4 * 256 * 100 - 1):
        monkeypatch.setattr(sys.modules[block_cross_entropy.__module__], "SAVE_BUDGET_BYTES", budget)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):  # type: ignore[misc]
            run(case)
        kept[budget] = max(sizes)
    assert list(kept.values()) == [256 * 100, 256 * 8]


def test_empty_batches() -> None:
    hidden = torch.zeros(0, 7, 8, requires_grad=True)
    loss, stats = block_cross_entropy(hidden, torch.ones(5, 8), torch.zeros(0, 7, dtype=torch.int64), torch.zeros(0, 7))
    loss.backward()
    assert loss == 0
    assert stats.nll_sum.shape == (0,)


def wrong(**changes: Any) -> dict[str, Any]:
    case = make_case()
    return {
        "hidden": case.hidden,
        "weight": case.weight,
        "labels": case.labels,
        "token_weight": case.token_weight,
    } | changes


ids = torch.zeros(3, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.full((3, 7), 13)}, "labels: 13 is outside the vocabulary of 13"),
        ({"labels": torch.full((3, 7), -1)}, "labels: -1 is outside"),
        ({"labels": torch.full((3, 7), 10), "vocab_size": 10}, "outside the vocabulary of 10"),
        ({"labels": ids[:2]}, r"for labels \(2, 7\)"),
        ({"labels": ids.int()}, "labels: expected int64"),
        ({"token_weight": torch.ones(3, 6)}, r"token_weight: expected float32 \(3, 7\)"),
        ({"token_weight": torch.ones(3, 7).half()}, "token_weight: expected float32"),
        ({"token_weight": torch.ones(3, 7, requires_grad=True)}, "token_weight: must not require"),
        ({"hidden": torch.ones(20, 8)}, r"hidden: expected floating-point \[3, 7, H\] or \[21, H\]"),
        ({"hidden": torch.ones(7, 3, 8)}, "hidden: expected floating-point"),
        ({"hidden": torch.ones(3, 7, 8, dtype=torch.int64)}, "hidden: expected floating-point"),
        ({"weight": torch.ones(13, 9)}, "weight: expected"),
        ({"weight": torch.ones(0, 8)}, "at least one row"),
        ({"weight": torch.ones(13, 8).bfloat16()}, "weight: expected torch.float32"),
        ({"weight": torch.ones(13, 8, device="meta")}, "one device"),
        ({"vocab_size": 14}, "vocab_size 14: must lie between 1 and the 13 rows"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"mode": "fast"}, "choose from auto, save, chunk, score"),
        ({"backend": "cuda"}, "choose from auto, torch, triton"),
        (
            {"backend": "triton", "hidden": torch.ones(3, 7, 8).double(), "weight": torch.ones(13, 8).double()},
            "bfloat16, float16 or float32",
        ),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss nan"),
        ({"logit_softcap": float("inf")}, "logit_softcap inf"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"chunk_rows": 0}, "chunk_rows 0"),
        ({"score_buffer_bytes": -1}, "score_buffer_bytes -1"),
        ({"block_ids": ids}, "give num_blocks"),
        ({"block_ids": ids + 4, "num_blocks": 4}, r"block_ids: must lie in \[0, 4\)"),
        ({"block_ids": ids[0], "num_blocks": 4}, "block_ids: expected int64"),
        ({"num_blocks": 4}, "num_blocks: goes with block_ids"),
    ],
)
def test_wrong_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_cross_entropy(**wrong(**changes))

"""The statistics of a study, against SciPy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron_lfr.study.statistics import (
    document_bootstrap,
    equivalent_compute,
    holm,
    kendall_tau,
    log_interval,
    paired_t,
)


def test_paired_t_is_scipys() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=5), generator.normal(size=5)
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    result = paired_t((a - b).tolist())
    np.testing.assert_allclose([result.low, result.high, result.p], [low, high, expected.pvalue], rtol=1e-12)
    assert (result.mean, result.n) == (pytest.approx(np.mean(a - b)), 5)


def test_one_value_has_no_interval() -> None:
    result = paired_t([-0.5])
    assert (result.mean, result.low, result.high, result.p, result.n) == (-0.5, None, None, None, 1)
    assert math.isnan(paired_t([]).mean)


def test_equal_differences_have_an_interval_without_width() -> None:
    assert (paired_t([-0.5, -0.5]).low, paired_t([-0.5, -0.5]).p, paired_t([0.0, 0.0]).p) == (-0.5, 0.0, 1.0)


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """By definition: go through the sorted p-values, and stop at the first above alpha / (m - i)."""
    generator = np.random.default_rng(5)
    for p in generator.random((50, 6)) ** 3:
        adjusted = holm(p.tolist())
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for i, index in enumerate(np.argsort(p)):
                if p[index] > alpha / (len(p) - i):
                    break
                rejected.add(int(index))
            assert {i for i, value in enumerate(adjusted) if value <= alpha} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_bootstrap_resamples_documents_not_blocks() -> None:
    """All 3^3 x 2^2 resamples of the documents, each as likely: the quantiles of the macro mean over them."""
    differences = np.array([1.0, 1.2, 5.0, 4.0, -2.0, 0.5, 3.0, math.nan])
    documents = np.array([0, 0, 1, 1, 2, 0, 1, 1])
    domains = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    values = []
    for first in itertools.product(range(3), repeat=3):
        for second in itertools.product(range(2), repeat=2):
            parts = [
                np.concatenate([differences[(domains == d) & (documents == i) & np.isfinite(differences)] for i in ids])
                for d, ids in ((0, first), (1, second))
            ]
            values.append(np.mean([part.mean() for part in parts]))
    result = document_bootstrap(differences, documents, domains)
    assert result.mean == pytest.approx((np.mean([1, 1.2, 5, 4, -2]) + np.mean([0.5, 3])) / 2)
    assert result.n == 5
    spread = np.std(values)
    assert result.low == pytest.approx(np.quantile(values, 0.025), abs=0.15 * spread)
    assert result.high == pytest.approx(np.quantile(values, 0.975), abs=0.15 * spread)


def test_bootstrap_of_one_document_a_domain_has_no_interval() -> None:
    result = document_bootstrap(np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 1]))
    assert (result.mean, result.low, result.high) == (1.5, None, None)


def test_token_equivalent_is_exact_where_loss_is_linear_in_log_compute() -> None:
    compute = [100.0, 50.0, 150.0, 75.0]
    losses = [4.0 - 0.7 * math.log(c) for c in compute]
    for share, beyond in ((0.25, True), (0.6, False), (1.4, False), (2.0, True)):
        point = equivalent_compute(compute, losses, 4.0 - 0.7 * math.log(100 * share))
        assert point is not None
        assert (point.compute, point.beyond) == (pytest.approx(100 * share), beyond)


def test_token_equivalent_lies_on_the_line_between_the_two_nearest_runs() -> None:
    point = equivalent_compute([1.0, math.e, math.e**2], [5.0, 4.0, 3.9], 3.95)
    assert point is not None
    assert point.compute == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize(("compute", "losses"), [([1.0], [3.0]), ([1.0, 2.0, 3.0], [3.0, 3.1, 2.9])])
def test_no_token_equivalent_of_a_loss_that_does_not_fall(compute: list[float], losses: list[float]) -> None:
    assert equivalent_compute(compute, losses, 3.0) is None


def test_no_token_equivalent_far_beyond_what_was_run() -> None:
    """Of a line that hardly falls, it would be any number, or none that fp64 has."""
    assert equivalent_compute([1.0, 1.5], [4.0, 3.99995], 3.85) is None
    assert equivalent_compute([1.0, math.e], [4.0, 3.0], 3.0 - 2.3) is not None
    assert equivalent_compute([1.0, math.e], [4.0, 3.0], 3.0 - 2.31) is None


def test_log_interval_is_geometric() -> None:
    result = log_interval([2.0, 8.0])
    half = stats.t.ppf(0.975, 1) * np.std(np.log([2, 8]), ddof=1) / math.sqrt(2)
    assert (result.mean, result.low) == (pytest.approx(4.0), pytest.approx(4.0 * math.exp(-half)))


def test_kendall_tau_counts_pairs_in_the_same_order() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    pairs = list(itertools.combinations(range(4), 2))
    agreeing = sum(1 if (a[i] - a[j]) * (b[i] - b[j]) > 0 else -1 for i, j in pairs)
    assert kendall_tau(a, b) == pytest.approx(agreeing / len(pairs))
    assert math.isnan(kendall_tau([1.0], [1.0]))

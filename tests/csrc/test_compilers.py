"""The orders have the same bits however the core is compiled."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from support.order_samples import CAP, CUTS, MASS, ORDERS, spread_scores

CSRC = Path(__file__).parents[2] / "csrc"
# The module under test is g++'s at -O3, as a rule.
BUILDS = [(name, level) for name, level in (("g++", "-O0"), ("clang++", "-O3")) if shutil.which(name)]
N, SAMPLES = 600_000, 200_000

SOURCE = """
#include "orders/cluster.h"
#include "orders/order.h"
#include "orders/weights.h"
using namespace mlfr;
static BlockWeights weigh(const float* s, uint64_t n) { return {Scores{s, n}, {1.0, 3.0}, 5.0, 2}; }
static Mass mass() { return {{1.0, 2.0, 3.0}, 0.5}; }
extern "C" {
void order_threshold(const float* s, uint64_t n, uint64_t samples, uint32_t* out) {
    mlfr::order_threshold(Scores{s, n}, 0.3, 0.1, true, samples, 7, 2, out);
}
void order_visits(const float* s, uint64_t n, uint64_t samples, uint32_t* out) {
    mlfr::order_visits(weigh(s, n), mass(), samples, 7, 2, out);
}
void order_choice(const float* s, uint64_t n, uint64_t samples, uint32_t* out) {
    mlfr::order_choice(weigh(s, n), mass(), samples, 7, 2, out);
}
void interleave(const float*, uint64_t, uint64_t samples, uint32_t* out) {
    std::vector<uint32_t> ids(samples);
    for (uint64_t i = 0; i < samples; ++i) ids[i] = static_cast<uint32_t>(i);
    mlfr::interleave(ids.data(), {samples / 3, samples - samples / 3}, 7, 2, out);
}
void clusters(const float* s, uint64_t n, double* cuts, double* perplexity) {
    const std::vector<double> found = cluster(Scores{s, n}, 8, 4096, 2);
    const std::vector<double> means = BlockWeights(Scores{s, n}, found, 5.0, 2).means(2);
    for (size_t c = 0; c < found.size(); ++c) cuts[c] = found[c];
    for (size_t c = 0; c + 1 < means.size(); ++c) perplexity[c] = means[c];
}
}
"""


@pytest.mark.skipif(not BUILDS, reason="no C++ compiler")
def test_compilers_change_no_order(tmp_path: Path) -> None:
    source = tmp_path / "orders.cpp"
    source.write_text(SOURCE)
    parts = sorted(map(str, CSRC.glob("orders/*.cpp")))
    scores = spread_scores(N)
    outcomes: set[bytes] = set()
    for compiler, level in BUILDS:
        library = tmp_path / f"{compiler}{level}.so"
        flags = ["-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC", "-pthread", level]
        if compiler == "clang++":
            flags.append("-DMLFR_NO_AVX2")  # the others use it where the processor has it
        subprocess.run([compiler, *flags, f"-I{CSRC}", str(source), *parts, "-o", str(library)], check=True)
        outcomes.add(results(ctypes.CDLL(str(library)), scores))
    assert len(outcomes) == 1
    assert (CUTS, CAP, MASS) == ([1.0, 3.0], 5.0, ([1.0, 2.0, 3.0], 0.5))  # those of the source above
    assert ORDERS["order_choice"](scores, 1).tobytes() in outcomes.pop()  # N // 3 samples there, too


def results(library: ctypes.CDLL, scores: npt.NDArray[np.float32]) -> bytes:
    """Return all orders and the clusters, as bytes."""
    pointer = ctypes.c_void_p(scores.ctypes.data)
    everything = []
    for name in ("order_threshold", "order_visits", "order_choice", "interleave"):
        out = np.zeros(SAMPLES, np.uint32)
        count = ctypes.c_uint64(len(scores))
        getattr(library, name)(pointer, count, ctypes.c_uint64(SAMPLES), ctypes.c_void_p(out.ctypes.data))
        assert out.any()
        everything.append(out.tobytes())
    cuts, perplexity = np.zeros(7), np.zeros(8)
    numbers = (ctypes.c_void_p(cuts.ctypes.data), ctypes.c_void_p(perplexity.ctypes.data))
    library.clusters(pointer, ctypes.c_uint64(len(scores)), *numbers)
    assert (np.diff(cuts) > 0).all()
    return b"".join([*everything, cuts.tobytes(), perplexity.tobytes()])

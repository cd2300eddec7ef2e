"""The core's exponentials and logarithms are close to the true values, with the same bits however compiled."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
Doubles = npt.NDArray[np.float64]
Function = Callable[[Doubles], Doubles]

SOURCE = """
#include "common/detmath.h"
#define EXPORT(name, argument)                                                          \\
    extern "C" void name(const double* x, double* y, long n) {                          \\
        for (long i = 0; i < n; ++i) y[i] = mlfr::name(static_cast<argument>(x[i]));    \\
    }
namespace mlfr {
double exponential_of_word(uint64_t word) {
    const Uniform uniform(word);
    return det_exponential(uniform.number, uniform.rest);
}
}  // namespace mlfr
EXPORT(det_exp, double)
EXPORT(det_expf, float)
EXPORT(exponential_of_word, uint64_t)
"""


def compiled(folder: Path, compiler: str, optimisation: str) -> dict[str, Function]:
    """Compile the functions, for arrays of doubles."""
    source, library = folder / "detmath_on_arrays.cpp", folder / f"{compiler}{optimisation}.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC", optimisation, f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def on_array(name: str) -> Function:
        def function(x: Doubles) -> Doubles:
            y = np.empty_like(x)
            getattr(loaded, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_long(len(x)))
            return y

        return function

    return {name: on_array(name) for name in ("det_exp", "det_expf", "exponential_of_word")}


@pytest.fixture(scope="module")
def points() -> dict[str, Doubles]:
    """Return arguments for each function: all of its range, the most important values, and where its parts meet."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, 100_000, np.uint64) >> rng.integers(0, 52, 100_000, np.uint64)
    return {
        "det_exp": np.concatenate(
            [rng.uniform(-700, 700, 50_000), rng.uniform(-12, 12, 50_000), [0.0, -0.0, 700, -700]]
        ),
        "det_expf": np.concatenate([rng.uniform(-86, 86, 50_000), [0.0, -80, 80]])
        .astype(np.float32)
        .astype(np.float64),
        # Multiples of 4096 that doubles hold: small ones give small numbers, those near 2^64 the largest.
        "exponential_of_word": np.concatenate([words >> 12 << 12, [0, 4096, 2**64 - 2048 * 1024]]).astype(np.float64),
    }


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_they_are_as_exact_as_they_say(tmp_path: Path, points: dict[str, Doubles]) -> None:
    functions = compiled(tmp_path, COMPILERS[0], "-O3")
    assert np.abs(functions["det_exp"](points["det_exp"]) / np.exp(points["det_exp"]) - 1).max() < 1e-15
    assert functions["det_exp"](np.array([-np.inf, np.inf])).tolist() == pytest.approx([np.exp(-700), np.exp(700)])
    assert np.abs(functions["det_expf"](points["det_expf"]) / np.exp(points["det_expf"]) - 1).max() < 3e-7
    words = points["exponential_of_word"].astype(np.uint64)
    exact = -np.log1p(-(words >> 12).astype(np.float64) * 2.0**-52)
    values = functions["exponential_of_word"](points["exponential_of_word"])
    assert np.abs(values[exact > 0] / exact[exact > 0] - 1).max() < 1e-6
    assert (values[exact == 0] == 0).all()


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_compilers_change_no_bit(tmp_path: Path, points: dict[str, Doubles]) -> None:
    builds = [compiled(tmp_path, compiler, level) for compiler in COMPILERS for level in ("-O0", "-O3")]
    for name, x in points.items():
        assert len({build[name](x).tobytes() for build in builds}) == 1

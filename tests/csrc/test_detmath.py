"""The core's own exp and log: close to the true values, and the same bits however they are compiled."""

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
#include "detmath.h"
#define EXPORT(name)                                                          \\
    extern "C" void name(const double* x, double* y, long n) {                \\
        for (long i = 0; i < n; ++i) y[i] = mlfr::name(x[i]);                 \\
    }
EXPORT(det_exp)
EXPORT(det_log)
"""


def compiled(folder: Path, compiler: str, optimisation: str) -> dict[str, Function]:
    """det_exp and det_log on arrays."""
    source, library = folder / "detmath_on_arrays.cpp", folder / f"{compiler}{optimisation}.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", optimisation, f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def on_array(name: str) -> Function:
        def function(x: Doubles) -> Doubles:
            y = np.empty_like(x)
            getattr(loaded, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_long(len(x)))
            return y

        return function

    return {name: on_array(name) for name in ("det_exp", "det_log")}


@pytest.fixture(scope="module")
def points() -> dict[str, Doubles]:
    """Arguments of each function: all its range, the values that matter most, and where its pieces meet."""
    rng = np.random.default_rng(0)
    near_one = 1 + rng.normal(0, 1, 20_000) * 10.0 ** rng.uniform(-15, -1, 20_000)
    return {
        "det_exp": np.concatenate(
            [rng.uniform(-700, 700, 50_000), rng.uniform(-12, 12, 50_000), [0.0, -0.0, 700, -700]]
        ),
        "det_log": np.concatenate(
            [
                np.exp(rng.uniform(-690, 690, 50_000)),
                rng.random(50_000) + 2**-53,
                near_one,
                2.0 ** np.arange(-60, 60) / 2**0.5,
            ]
        ),
    }


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_exp_and_log_are_as_exact_as_they_say(tmp_path: Path, points: dict[str, Doubles]) -> None:
    functions = compiled(tmp_path, COMPILERS[0], "-O3")
    exponential, logarithm = np.exp(points["det_exp"]), np.log(points["det_log"])
    assert np.abs(functions["det_exp"](points["det_exp"]) / exponential - 1).max() < 1e-15
    nonzero = logarithm != 0
    assert np.abs(functions["det_log"](points["det_log"])[nonzero] / logarithm[nonzero] - 1).max() < 1e-13
    assert functions["det_log"](np.ones(1))[0] == 0
    assert functions["det_exp"](np.array([-np.inf, np.inf])).tolist() == pytest.approx([np.exp(-700), np.exp(700)])


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_compilers_change_no_bit(tmp_path: Path, points: dict[str, Doubles]) -> None:
    builds = [compiled(tmp_path, compiler, level) for compiler in COMPILERS for level in ("-O0", "-O3")]
    for name, x in points.items():
        assert len({build[name](x).tobytes() for build in builds}) == 1

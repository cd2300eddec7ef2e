"""Builds the package and its C++ extension (csrc/), which needs a C++17 compiler and pybind11."""

from __future__ import annotations

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ParallelCompile("MAX_JOBS").install()

extension = Pybind11Extension(
    "megatron_lfr._C",
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
    cxx_std=17,
    # No contraction to fused multiply-add, no -march=native: a phase's order must have the same bits on every machine.
    # Nothing reads floating-point exceptions: without them, the compiler turns conditions into vector instructions.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    name="megatron_lfr",
    version="0.1.0",
    description="Megatron-style pretraining of Llama models with Learn-Focus-Review data curricula",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_lfr", "megatron_lfr.*"]),
    package_data={"megatron_lfr": ["py.typed", "*.pyi", "report/assets/*"]},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "numpy>=1.26",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "tokenizers>=0.21",
        "safetensors>=0.4.5",
        "tyro>=1.0,<2",
        "PyYAML>=6.0",
        "rich>=13.9",
        "tensorboard>=2.18",
    ],
    extras_require={
        "wandb": ["wandb>=0.19"],
        "lm-eval": ["lm-eval>=0.4.9"],
        "liger": ["liger-kernel>=0.5.10"],
        "hf": ["transformers>=4.57"],
        "corpora": ["zstandard>=0.22", "pyarrow>=15", "datasets>=3.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5.0",
            "accelerate>=1.1",
            "zstandard>=0.22",
            "pyarrow>=15",
        ],
        "lint": ["ruff", "mypy", "clang-format", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["megatron-lfr=megatron_lfr.__main__:main"]},
)

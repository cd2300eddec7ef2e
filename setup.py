"""Builds the package and its C++ extension (csrc/), which needs a C++17 compiler, pybind11 and ninja."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

from ninja import Writer, escape
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class NinjaBuild(build_ext):
    """setuptools says what compiles and links the extension, and ninja does what has changed since the last build."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Not setuptools' folder, which is a new one for every `pip install -e .`
        self.build_temp = f"build/{sys.implementation.cache_tag}-{self.plat_name}"

    def build_extension(self, extension: Extension) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        built, ninja_file = folder / "_C.so", folder / "build.ninja"
        ninja_file.write_text(self._ninja_file(extension, folder, str(built)))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([sys.executable, "-m", "ninja", "-f", str(ninja_file), *jobs]).returncode != 0:
            raise CompileError("csrc/ does not compile, see above")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def _ninja_file(self, extension: Extension, folder: Path, built: str) -> str:
        includes = [f"-I{path}" for path in (*extension.include_dirs, *self.compiler.include_dirs)]
        compile_words = [*self.compiler.compiler_so_cxx, *includes, *extension.extra_compile_args]
        link_words = [*self.compiler.linker_so_cxx, *extension.extra_link_args]
        text = StringIO()
        ninja = Writer(text)
        ninja.variable("builddir", str(folder))  # where ninja remembers commands and included files
        ninja.rule(
            "compile",
            f"{escape(shlex.join(compile_words))} -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", f"{escape(shlex.join(link_words))} $in -o $out")
        objects = [str(folder / Path(source).with_suffix(".o")) for source in extension.sources]
        for source, made in zip(extension.sources, objects, strict=True):
            ninja.build(made, "compile", source)
        ninja.build(built, "link", objects)
        return text.getvalue()


def csrc(pattern: str) -> list[str]:
    """Files below csrc/ that fit a pattern, relative to this one."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


extension = Pybind11Extension(
    "megatron_lfr._C",
    csrc("*.cpp"),
    depends=csrc("*.h"),  # part of a source distribution
    include_dirs=["csrc"],
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
    package_data={"megatron_lfr": ["py.typed", "*.pyi", "megatron_flags.csv", "report/assets/*"]},
    ext_modules=[extension],
    cmdclass={"build_ext": NinjaBuild},
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
        "study": ["scipy>=1.11"],
        "liger": ["liger-kernel>=0.5.10"],
        "hf": ["transformers>=4.57"],
        "deepspeed": ["deepspeed==0.19.8"],  # exactly: engine/deepspeed_partitions.py reads what is private there
        "corpora": ["zstandard>=0.22", "pyarrow>=15", "datasets>=3.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5.0",
            "accelerate>=1.1",
            "zstandard>=0.22",
            "pyarrow>=15",
            "lm-eval>=0.4.9",
            "scipy>=1.11",
            "peft>=0.17",
            "deepspeed==0.19.8",
        ],
        "lint": ["ruff", "mypy", "clang-format", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["megatron-lfr=megatron_lfr.__main__:main"]},
)

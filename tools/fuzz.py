"""Fuzzes the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, and its threads under ThreadSanitizer.

    python tools/fuzz.py [--targets dataset orders] [--executions 100000] [--seed 1] [--compiler g++] [--build FOLDER]
    python tools/fuzz.py --libfuzzer --executions 1000000     # clang++: inputs that are guided by coverage
    python tools/fuzz.py --threads                            # ThreadSanitizer

`dataset` opens and reads false .idx and .bin files; `orders` calls every order with hostile numbers, `weighings` what
makes blocks count differently and samples at random; `commonness` reads copies and likelihoods. Each checks the
results against a second implementation: a wrong answer is a failure, as is a report of a sanitizer. The inputs follow
from the seed. An input that fails is kept in FOLDER as `crash-TARGET`; `FOLDER/TARGET CRASH_FILE` runs it again. The
exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, FUZZ = ROOT / "csrc", ROOT / "tests" / "csrc" / "fuzz"

IO = ["io/dataset", "io/file"]
ORDERS = [f"orders/{path.stem}" for path in sorted(CSRC.glob("orders/*.cpp"))]
COMMONNESS = [f"commonness/{path.stem}" for path in sorted(CSRC.glob("commonness/*.cpp"))]
CORE = {"dataset": IO, "orders": ORDERS, "weighings": ORDERS, "commonness": IO + COMMONNESS}
OWN = {name: [f"{name}_target"] for name in CORE} | {"dataset": ["dataset_target", "dataset_input"]}

MEMORY = ["-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
COMMON = ["-std=c++17", "-Wall", "-Wextra", "-g1", "-ffp-contract=off", "-pthread"]

LIBFUZZER_LIMITS = ["-timeout=30", "-malloc_limit_mb=64", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1"]


def sources(target: str, csrc: Path = CSRC) -> list[Path]:
    """Return the source files of a fuzz target without its driver; `csrc` may be a changed copy of the core."""
    return [FUZZ / f"{name}.cpp" for name in OWN[target]] + [csrc / f"{name}.cpp" for name in CORE[target]]


def compile_all(compiler: str, flags: Sequence[str], files: Sequence[Path], folder: Path) -> list[Path]:
    """Compile `files` into object files in `folder`, two at a time. Errors: CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(file: Path) -> Path:
        made = folder / f"{file.stem}.o"
        includes = [f"-I{CSRC}", f"-I{FUZZ}"]
        subprocess.run([compiler, *COMMON, *flags, *includes, "-c", str(file), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, files))


def link(compiler: str, flags: Sequence[str], objects: Sequence[Path], program: Path) -> Path:
    """Link object files to a program."""
    subprocess.run([compiler, *COMMON, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def fuzz(target: str, options: argparse.Namespace) -> int:
    """Build and run a target; return its exit code."""
    flags = [*MEMORY, "-O1", *(["-fsanitize=fuzzer"] if options.libfuzzer else [])]
    driver = FUZZ / ("libfuzzer.cpp" if options.libfuzzer else "driver.cpp")
    objects = compile_all(options.compiler, flags, [*sources(target), driver], options.build / f"{target}-objects")
    program = link(options.compiler, flags, objects, options.build / target)
    crash = options.build / f"crash-{target}"
    print(f"{target}: seed {options.seed}, {options.compiler}", flush=True)
    if not options.libfuzzer:
        return subprocess.run([program, str(options.executions), str(options.seed), crash]).returncode
    runs = [f"-runs={options.executions}", f"-seed={options.seed}", f"-exact_artifact_path={crash}"]
    return subprocess.run([program, *runs, *LIBFUZZER_LIMITS]).returncode


def run_threads(options: argparse.Namespace) -> int:
    """Build and run the program for ThreadSanitizer; return its exit code."""
    program = build_threads(options.compiler, options.build)
    return subprocess.run([program, "5000000", options.build]).returncode


def build_threads(compiler: str, folder: Path) -> Path:
    """Build the program whose threads ThreadSanitizer watches."""
    core = [CSRC / f"{name}.cpp" for name in IO + ORDERS]
    flags = [*THREADS, "-O1"]
    return link(
        compiler, flags, compile_all(compiler, flags, [*core, FUZZ / "threads.cpp"], folder), folder / "threads"
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Exits if the compiler is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(CORE), default=sorted(CORE))
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compiler", help="C++ compiler (default: g++, or clang++ with --libfuzzer)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz", metavar="FOLDER")
    parser.add_argument("--libfuzzer", action="store_true")
    parser.add_argument("--threads", action="store_true")
    options = parser.parse_args()
    if options.executions < 1 or options.seed < 0:
        parser.error("--executions must be at least 1, --seed at least 0")
    options.compiler = options.compiler or ("clang++" if options.libfuzzer else "g++")
    if not shutil.which(options.compiler):
        parser.error(f"--compiler: {options.compiler} is not installed")
    return options


def main() -> int:
    options = parse_arguments()
    options.build.mkdir(parents=True, exist_ok=True)
    codes = [run_threads(options)] if options.threads else [fuzz(name, options) for name in options.targets]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

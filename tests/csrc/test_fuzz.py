"""The core under sanitizers: short runs of the fuzz targets and of the threads; tools/fuzz.py runs them for longer."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from support.waiting import LIMIT

ROOT = Path(__file__).parents[2]
COMPILER = "g++"
INPUTS = ROOT / "tests" / "csrc" / "fuzz" / "inputs"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


tool = load_tool()
FAST = [*tool.MEMORY, "-O1"]
QUICKLY_COMPILED = [*tool.MEMORY, "-O0"]


def skip_without(flags: list[str], folder: Path) -> None:
    """Skip if the compiler is missing, or programs with its sanitizer do not run."""
    if not shutil.which(COMPILER):
        pytest.skip(f"no {COMPILER}")
    source, program = folder / "nothing.cpp", folder / "nothing"
    source.write_text("int main() {}")
    built = subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], capture_output=True)
    if built.returncode != 0 or subprocess.run([program], capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER} {flags[0]} does not work here")


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=LIMIT)


def run_kept_inputs(program: Path, target: str) -> None:
    """Run the inputs that failed in earlier runs."""
    for path in INPUTS.glob(f"{target}-*"):
        done = run(program, path)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compile the target of the dataset; return its object files by name."""
    folder = tmp_path_factory.mktemp("dataset")
    skip_without(FAST, folder)
    made = tool.compile_all(COMPILER, FAST, [*tool.sources("dataset"), tool.FUZZ / "driver.cpp"], folder)
    return {path.stem: path for path in made}


def test_files_that_lie_do_no_harm(objects: dict[str, Path], tmp_path: Path) -> None:
    done = run(
        tool.link(COMPILER, FAST, list(objects.values()), tmp_path / "dataset"), "20000", "1", tmp_path / "crash"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20000 executions")


MUTANTS = {
    "counts whose products overflow": (
        "sequences_ > payload / 12 || entries_ > (payload - 12 * sequences_) / 8 ||",
        "",
        "ends early",
    ),
    "overlapping sequences": (
        "positions[i]) != tokens_",
        "positions[i]) < tokens_",
        "takes what the other reader takes",
    ),
    "a write beyond a buffer": (
        "std::min(kEntriesAtATime, entries_)",
        "std::min(kEntriesAtATime, entries_ - 1)",
        "heap-buffer-overflow",
    ),
    "an allocation without bounds": (
        "lengths(last - first)",
        "lengths((last - first) << 32)",
        "allocation-size-too-big",
    ),
    "a misaligned read": (
        "std::memcpy(&version, header + 9, 8)",
        "version = *reinterpret_cast<const uint64_t*>(header + 9)",
        "misaligned address",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_faults_in_the_reader_are_found(objects: dict[str, Path], tmp_path: Path, name: str) -> None:
    right, wrong, message = MUTANTS[name]
    source = (tool.CSRC / "io" / "dataset.cpp").read_text()
    assert source.count(right) == 1
    mutant = tmp_path / "dataset.cpp"
    mutant.write_text(source.replace(right, wrong))
    changed = {**objects, "dataset": tool.compile_all(COMPILER, [*FAST, "-w"], [mutant], tmp_path)[0]}
    crash = tmp_path / "crash"
    program = tool.link(COMPILER, FAST, list(changed.values()), tmp_path / "mutant")
    for arguments in (["20000", "1", crash], [crash]):  # the input that is kept fails again
        done = run(program, *arguments)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.mark.slow
def test_hostile_numbers_do_no_harm_to_orders(tmp_path: Path) -> None:
    skip_without(QUICKLY_COMPILED, tmp_path)
    parts = [*tool.sources("orders"), tool.FUZZ / "weighings_target.cpp", tool.FUZZ / "driver.cpp"]
    made = {path.stem: path for path in tool.compile_all(COMPILER, QUICKLY_COMPILED, parts, tmp_path)}
    for target, other in (("orders", "weighings_target"), ("weighings", "orders_target")):
        objects = [path for name, path in made.items() if name != other]
        program = tool.link(COMPILER, QUICKLY_COMPILED, objects, tmp_path / target)
        done = run(program, "400", "1", tmp_path / "crash")
        assert done.returncode == 0, done.stderr
        run_kept_inputs(program, target)


@pytest.mark.slow
def test_token_files_that_lie_do_no_harm_to_commonness(tmp_path: Path) -> None:
    skip_without(QUICKLY_COMPILED, tmp_path)
    parts = [*tool.sources("commonness"), tool.FUZZ / "driver.cpp"]
    made = tool.compile_all(COMPILER, QUICKLY_COMPILED, parts, tmp_path)
    done = run(tool.link(COMPILER, QUICKLY_COMPILED, made, tmp_path / "commonness"), "200", "1", tmp_path / "crash")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_threads_do_not_race(tmp_path: Path) -> None:
    skip_without(tool.THREADS, tmp_path)
    done = run(tool.build_threads(COMPILER, tmp_path), "600000", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "38 results alike" in done.stdout

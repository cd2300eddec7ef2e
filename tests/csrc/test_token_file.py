"""Reading .bin files: every type, every row outside, and files that are not what they should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr._C import IndexFile, TokenFile

TYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy_text_document.bin"


@pytest.mark.parametrize("open_file", [IndexFile, lambda path: TokenFile(path, 2, 0)])
class TestNotAFile:
    def test_directory(self, open_file: type, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not a regular file"):
            open_file(str(tmp_path))

    def test_missing(self, open_file: type, path: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            open_file(str(path))
        assert caught.value.filename == str(path)

    def test_pipe_without_a_writer(self, open_file: type, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(ValueError, match="not a regular file"):
            open_file(str(path))


def write_tokens(path: Path, count: int, dtype: npt.DTypeLike = np.uint16) -> npt.NDArray[Any]:
    limits = np.iinfo(np.dtype(dtype))
    tokens = np.random.default_rng(1).integers(limits.min, limits.max, count, dtype, endpoint=True)
    tokens[:2] = limits.min, limits.max
    path.write_bytes(tokens.tobytes())
    return tokens


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_of_every_type(path: Path, dtype: type, threads: int) -> None:
    tokens = write_tokens(path, 1000, dtype)
    starts = np.random.default_rng(1).integers(0, 1000 - 37, 50, endpoint=True)
    starts[:2] = 0, 1000 - 37
    out = np.full((50, 37), 7, dtype)
    TokenFile(str(path), tokens.itemsize, 1000).read(starts, out, threads)
    assert np.array_equal(out, np.stack([tokens[start : start + 37] for start in starts]))


@pytest.mark.parametrize("size", [0, 199, 201, 198, 202])
def test_token_files_of_another_size(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"{path.name}: holds {size} bytes"):
        TokenFile(str(path), 2, 100)


def test_sizes_that_overflow(path: Path) -> None:
    path.write_bytes(bytes(8))
    with pytest.raises(ValueError, match="holds 8 bytes"):
        TokenFile(str(path), 4, 2**62 + 2)  # 4 x this is 8 modulo 2^64


@pytest.mark.parametrize("start", [-1, 91, 100, 2**63 - 1, -(2**63)])
def test_rows_outside_the_file_change_nothing(path: Path, start: int) -> None:
    write_tokens(path, 100)
    out = np.full((2, 10), 7, np.uint16)
    with pytest.raises(ValueError, match=path.name):
        TokenFile(str(path), 2, 100).read(np.array([0, start]), out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 10), np.uint16),
        np.zeros((3, 10), np.uint16),
        np.zeros((2, 10), np.int32),
        np.zeros((2, 10), np.uint8),
        np.zeros((2, 20), np.uint16)[:, ::2],
        np.zeros(20, np.uint16),
        [[0] * 10] * 2,
    ],
    ids=["too few rows", "too many rows", "wider type", "narrower type", "strided", "1-d", "list"],
)
def test_targets_that_do_not_fit(path: Path, out: npt.NDArray[Any]) -> None:
    write_tokens(path, 100)
    with pytest.raises(ValueError, match="out: "):
        TokenFile(str(path), 2, 100).read(np.array([0, 5]), out)


def test_a_read_only_target(path: Path) -> None:
    write_tokens(path, 100)
    out = np.zeros((1, 10), np.uint16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        TokenFile(str(path), 2, 100).read(np.array([0]), out)


@pytest.mark.parametrize("left", [50, 0], ids=["within a page", "whole pages are gone"])
def test_a_file_that_is_cut_off_while_open(path: Path, left: int) -> None:
    write_tokens(path, 20_000)
    file = TokenFile(str(path), 2, 20_000)
    os.truncate(path, left)
    for _ in range(2):  # the first error must not keep the second from being one
        with pytest.raises(OSError, match="ends early") as caught:
            file.read(np.array([40]), np.zeros((1, 10_000), np.uint16))
        assert caught.value.filename == str(path)


def test_a_bus_error_elsewhere_still_ends_the_process(path: Path) -> None:
    """Reading another map of a file that was cut off: not our memory, so not ours to survive."""
    script = (
        "import mmap, os, sys; from megatron_lfr._C import TokenFile; path = sys.argv[1]; "
        "file = TokenFile(path, 2, 20_000); map = mmap.mmap(os.open(path, os.O_RDONLY), 0, prot=mmap.PROT_READ); "
        "os.truncate(path, 0); print(map[0])"
    )
    write_tokens(path, 20_000)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_a_file_that_is_replaced_while_open_stays_the_one_that_was_opened(path: Path) -> None:
    tokens = write_tokens(path, 100)
    file = TokenFile(str(path), 2, 100)
    other = path.with_suffix(".other")
    other.write_bytes(bytes(10))
    other.replace(path)
    out = np.zeros((1, 100), np.uint16)
    file.read(np.array([0]), out)
    assert np.array_equal(out[0], tokens)


def test_without_maps_and_with_few_descriptors(tmp_path: Path) -> None:
    """A process that may map no more memory, and open only a few files, reads from more files than that."""
    for number in range(100):
        (tmp_path / f"{number}.bin").write_bytes(np.arange(number, number + 500_000, dtype="<u4").tobytes())
    script = (
        "import resource, sys, numpy as np; from megatron_lfr._C import TokenFile\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "files = [TokenFile(f'{sys.argv[1]}/{number}.bin', 4, 500_000) for number in range(100)]\n"
        "out = np.zeros((1, 3), np.uint32)\n"
        "for number, file in enumerate(files):\n"
        "    file.read(np.array([499_997]), out)\n"
        "    assert out[0].tolist() == [number + 499_997 + i for i in range(3)], (number, out)\n"
        "maps = sum(sys.argv[1] in line for line in open('/proc/self/maps'))\n"
        "assert 0 < maps < 100, maps\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "starts",
    [np.array([0, 5], np.int32), np.array([[0, 5]]), np.array([0, 1, 5, 1])[::2], [0, 5], np.array([0.0, 5.0])],
    ids=["int32", "2-d", "strided", "list", "float"],
)
def test_starts_of_another_kind(path: Path, starts: object) -> None:
    write_tokens(path, 100)
    with pytest.raises(ValueError, match="starts: must be a contiguous array of type int64"):
        TokenFile(str(path), 2, 100).read(starts, np.zeros((2, 10), np.uint16))  # type: ignore[arg-type]


def test_positions_beyond_four_gibibytes(path: Path) -> None:
    tokens = 2**31 + 100
    with path.open("wb") as file:  # a hole in the file: it takes no space
        file.seek(4 * (tokens - 3))
        file.write(np.array([5, 6, 7], "<i4").tobytes())
    out = np.full((2, 4), -7, np.int32)
    TokenFile(str(path), 4, tokens).read(np.array([tokens - 4, 0]), out)
    assert out.tolist() == [[0, 5, 6, 7], [0, 0, 0, 0]]


def test_nothing_to_read(path: Path) -> None:
    path.write_bytes(b"")
    file = TokenFile(str(path), 2, 0)
    file.read(np.empty(0, np.int64), np.empty((0, 0), np.uint16))
    file.read(np.zeros(3, np.int64), np.empty((3, 0), np.uint16))
    with pytest.raises(ValueError, match=path.name):
        file.read(np.zeros(1, np.int64), np.empty((1, 1), np.uint16))

"""Reading .bin files: every type, rows outside of the file, and files that are not as they should be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr._C import IndexFile, TokenFile
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.waiting import LIMIT

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


def test_a_file_that_is_cut_off_while_threads_read_it(path: Path) -> None:
    """Each read gives the tokens or an error, and none crashes; once the file is short, all are errors."""
    tokens = write_tokens(path, 200_000)
    file = TokenFile(str(path), 2, 200_000)
    started, cut = threading.Barrier(5), threading.Event()

    def read_until_it_fails() -> str:
        out = np.zeros((4, 50_000), np.uint16)
        started.wait(LIMIT)
        while True:
            late = cut.is_set()
            try:
                file.read(np.array([0, 50_000, 100_000, 150_000]), out, 2)
            except OSError as error:
                return error.filename
            assert not late, "a file that is short gave tokens"
            assert np.array_equal(out.ravel(), tokens)

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(read_until_it_fails) for _ in range(4)]
        started.wait(LIMIT)
        os.truncate(path, 1000)
        cut.set()
        assert [result.result(LIMIT) for result in results] == [str(path)] * 4


def run_python(script: str, *arguments: object, **environment: str) -> None:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_reading_handles_no_signal(path: Path) -> None:
    write_tokens(path, 100)
    run_python(
        "import sys, numpy as np; from megatron_lfr._C import TokenFile\n"
        "handled = lambda: [line for line in open('/proc/self/status') if line.startswith('SigCgt')]\n"
        "before = handled()\n"
        "TokenFile(sys.argv[1], 2, 100).read(np.array([0]), np.zeros((1, 9), np.uint16))\n"
        "assert handled() == before, (before, handled())\n",
        path,
    )


@pytest.fixture
def hostile_pread(tmp_path: Path) -> Path:
    """Build a library whose pread is interrupted, or reads less than was asked for, and waits while $BLOCK exists."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    source, library = tmp_path / "pread.cpp", tmp_path / "pread.so"
    source.write_text("""
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int calls = 0;
static ssize_t hostile(int file, void* to, size_t count, off_t offset) {
    static auto real = reinterpret_cast<ssize_t (*)(int, void*, size_t, off_t)>(dlsym(RTLD_NEXT, "pread"));
    const char* block = getenv("BLOCK");
    while (block != nullptr && access(block, F_OK) == 0) usleep(1000);
    if (__sync_fetch_and_add(&calls, 1) % 2 == 0) return errno = EINTR, -1;
    return real(file, to, (count + 2) / 3, offset);
}
extern "C" ssize_t pread(int file, void* to, size_t n, off_t offset) { return hostile(file, to, n, offset); }
extern "C" ssize_t pread64(int file, void* to, size_t n, off_t offset) { return hostile(file, to, n, offset); }
extern "C" int pread_calls() { return calls; }
""")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library


def test_reads_that_are_interrupted_or_short(path: Path, hostile_pread: Path) -> None:
    write_tokens(path, 1000)
    run_python(
        "import ctypes, sys, numpy as np; from megatron_lfr._C import TokenFile\n"
        "out, tokens = np.zeros((2, 300), np.uint16), np.fromfile(sys.argv[1], np.uint16)\n"
        "TokenFile(sys.argv[1], 2, 1000).read(np.array([600, 7]), out)\n"
        "assert np.array_equal(out, [tokens[600:900], tokens[7:307]])\n"
        "assert ctypes.CDLL(None).pread_calls() > 10\n",
        path,
        LD_PRELOAD=str(hostile_pread),
    )


def test_reads_hold_no_lock_of_the_interpreter(tmp_path: Path, hostile_pread: Path) -> None:
    """While one thread waits for the disk, another continues: here, it is the one that ends the wait."""
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document(np.arange(100))
    run_python(
        "import os, sys, threading, numpy as np; from megatron_lfr._C import IndexFile, TokenFile\n"
        "prefix, block = sys.argv[1], os.environ['BLOCK']\n"
        "index, tokens = IndexFile(prefix + '.idx'), TokenFile(prefix + '.bin', 2, 100)\n"
        "for read in (\n"
        "    lambda: IndexFile(prefix + '.idx'), lambda: index.token_offset(0), lambda: index.sequence_lengths(0, 1),\n"
        "    lambda: tokens.read(np.array([0]), np.zeros((1, 9), np.uint16)),\n"
        "):\n"
        "    open(block, 'w').close()\n"
        "    begun = threading.Event()\n"
        "    thread = threading.Thread(target=lambda: (begun.set(), read()))\n"
        "    thread.start()\n"
        "    begun.wait()\n"
        "    os.unlink(block)\n"
        "    thread.join()\n",
        tmp_path / "c",
        LD_PRELOAD=str(hostile_pread),
        BLOCK=str(tmp_path / "block"),
    )


def test_a_file_that_is_replaced_while_open_stays_the_one_that_was_opened(path: Path) -> None:
    tokens = write_tokens(path, 100)
    file = TokenFile(str(path), 2, 100)
    other = path.with_suffix(".other")
    other.write_bytes(bytes(10))
    other.replace(path)
    out = np.zeros((1, 100), np.uint16)
    file.read(np.array([0]), out)
    assert np.array_equal(out[0], tokens)


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    """Some files are kept open, others are opened for each read; none stays open longer than its object."""
    for number in range(100):
        (tmp_path / f"{number}.bin").write_bytes(np.arange(number, number + 5000, dtype="<u4").tobytes())
    run_python(
        "import os, resource, sys, numpy as np; from megatron_lfr._C import TokenFile\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "folder = sys.argv[1]\n"
        "opened = lambda: len([d for d in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{d}') and "
        "os.readlink(f'/proc/self/fd/{d}').startswith(folder)])\n"
        "for _ in range(2):\n"
        "    files = [TokenFile(f'{folder}/{number}.bin', 4, 5000) for number in range(100)]\n"
        "    out = np.zeros((1, 3), np.uint32)\n"
        "    for number, file in enumerate(files):\n"
        "        file.read(np.array([4997]), out)\n"
        "        assert out[0].tolist() == [number + 4997 + i for i in range(3)], (number, out)\n"
        "    assert opened() == 10, opened()\n"
        "    del file, files\n"
        "    assert opened() == 0, opened()\n",
        tmp_path,
    )


def test_a_file_that_is_not_kept_open_is_replaced(path: Path) -> None:
    """The file that was opened is gone: reads fail, and never return the tokens of another file."""
    write_tokens(path, 100)
    run_python(
        "import os, resource, sys, numpy as np; from megatron_lfr._C import TokenFile\n"
        "limit = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))\n"
        "path = sys.argv[1]\n"
        "os.close(0)\n"
        "file = TokenFile(path, 2, 100)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, limit)\n"
        "open(path + '.other', 'wb').write(bytes(200))\n"
        "os.replace(path + '.other', path)\n"
        "try:\n"
        "    file.read(np.array([0]), np.zeros((1, 9), np.uint16))\n"
        "except OSError as error:\n"
        "    assert 'replaced by another' in str(error) and error.filename == path, error\n"
        "else:\n"
        "    raise AssertionError('tokens of another file')\n",
        path,
    )


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

"""Reading .bin files: every type, every row outside, and files that are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr._C import IndexFile, TokenFile

NUMPY_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
ITEM_SIZES = {code: np.dtype(kind).itemsize for code, kind in NUMPY_TYPES.items()}


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


def write_tokens(path: Path, code: int, count: int) -> npt.NDArray[np.int64]:
    dtype = np.dtype(NUMPY_TYPES[code])
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(code)
    tokens = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    tokens[:2] = limits.min, limits.max
    path.write_bytes(tokens.tobytes())
    return tokens.astype(np.int64)


@pytest.mark.parametrize("code", sorted(ITEM_SIZES))
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_of_every_type(path: Path, code: int, threads: int) -> None:
    tokens = write_tokens(path, code, 1000)
    starts = np.random.default_rng(1).integers(0, 1000 - 37, 50, endpoint=True)
    starts[:2] = 0, 1000 - 37
    out = np.full((50, 37), -7, np.int64)
    TokenFile(str(path), ITEM_SIZES[code], 1000).read(starts, 37, out, code, threads)
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
    write_tokens(path, 8, 100)
    out = np.full((2, 10), -7, np.int64)
    with pytest.raises(ValueError, match=path.name):
        TokenFile(str(path), 2, 100).read(np.array([0, start]), 10, out, 8)
    assert (out == -7).all()


@pytest.mark.parametrize(
    ("out", "code"),
    [
        (np.zeros((2, 9), np.int64), 8),
        (np.zeros((3, 10), np.int64), 8),
        (np.zeros((2, 10), np.int32), 8),
        (np.zeros((2, 20), np.int64)[:, ::2], 8),
        (np.zeros(20, np.int64), 8),
        (np.zeros((2, 10), np.int64), 4),
        (np.zeros((2, 10), np.int64), 6),
    ],
    ids=["short rows", "too many rows", "int32", "strided", "1-d", "wider type", "unknown type"],
)
def test_targets_that_do_not_fit(path: Path, out: npt.NDArray[np.int64], code: int) -> None:
    write_tokens(path, 8, 100)
    with pytest.raises(ValueError, match=r"out|dtype_code"):
        TokenFile(str(path), 2, 100).read(np.array([0, 5]), 10, out, code)


def test_a_read_only_target(path: Path) -> None:
    write_tokens(path, 8, 100)
    out = np.zeros((1, 10), np.int64)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        TokenFile(str(path), 2, 100).read(np.array([0]), 10, out, 8)


def test_a_file_that_is_cut_off_while_open(path: Path) -> None:
    write_tokens(path, 8, 100)
    file = TokenFile(str(path), 2, 100)
    os.truncate(path, 50)
    with pytest.raises(OSError, match="ends early") as caught:
        file.read(np.array([40]), 10, np.zeros((1, 10), np.int64), 8)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    "starts",
    [np.array([0, 5], np.int32), np.array([[0, 5]]), np.array([0, 1, 5, 1])[::2], [0, 5], np.array([0.0, 5.0])],
    ids=["int32", "2-d", "strided", "list", "float"],
)
def test_starts_of_another_kind(path: Path, starts: object) -> None:
    write_tokens(path, 8, 100)
    with pytest.raises(ValueError, match="starts: must be a contiguous array of type int64"):
        TokenFile(str(path), 2, 100).read(starts, 10, np.zeros((2, 10), np.int64), 8)  # type: ignore[arg-type]


def test_positions_beyond_four_gibibytes(path: Path) -> None:
    tokens = 2**31 + 100
    with path.open("wb") as file:  # a hole in the file: it takes no space
        file.seek(4 * (tokens - 3))
        file.write(np.array([5, 6, 7], "<i4").tobytes())
    out = np.full((2, 4), -7, np.int64)
    TokenFile(str(path), 4, tokens).read(np.array([tokens - 4, 0]), 4, out, 4)
    assert out.tolist() == [[0, 5, 6, 7], [0, 0, 0, 0]]


def test_nothing_to_read(path: Path) -> None:
    path.write_bytes(b"")
    file = TokenFile(str(path), 2, 0)
    file.read(np.empty(0, np.int64), 0, np.empty((0, 0), np.int64), 8)
    file.read(np.zeros(3, np.int64), 0, np.empty((3, 0), np.int64), 8)
    with pytest.raises(ValueError, match=path.name):
        file.read(np.zeros(1, np.int64), 1, np.empty((1, 1), np.int64), 8)

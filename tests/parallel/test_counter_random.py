"""Initial weights: Philox's bits, the normal distribution, and the same bits however a matrix is cut."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from megatron_lfr.parallel import counter_random
from megatron_lfr.parallel.counter_random import box_muller, fill_normal, fill_uniform, philox

Words = tuple[int, ...]
Doubles = npt.NDArray[np.float64]


def words(*values: int) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the published vectors of Random123
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert tuple(word.item() for word in philox(words(*counter), key)) == expected


def philox_by_hand(counter: Words, key: Words) -> Words:
    """As the paper has it, in integers of any size."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def test_philox_of_many_counters(rng: np.random.Generator) -> None:
    counters = rng.integers(0, 2**32, (4, 200))
    key = (int(rng.integers(2**32)), int(rng.integers(2**32)))
    results = torch.stack(philox([torch.from_numpy(row) for row in counters], key), -1).tolist()
    assert results == [list(philox_by_hand(tuple(map(int, column)), key)) for column in counters.T]


def test_box_muller_is_that_of_doubles(rng: np.random.Generator) -> None:
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1])
    pairs = np.array(list(itertools.product(edges, edges)))
    radius_word, angle_word = np.concatenate((pairs, rng.integers(0, 2**32, (100_000, 2)))).T
    both = box_muller(torch.from_numpy(radius_word), torch.from_numpy(angle_word))
    radius = np.sqrt(-2 * np.log((radius_word + 0.5) / 2**32))
    angle = (angle_word - 2**31) / 2**31 * np.pi
    for deviates, expected in zip(both, (radius * np.cos(angle), radius * np.sin(angle)), strict=True):
        assert deviates.dtype == torch.float32
        # Near u = 1 fp32 has steps of 2⁻²⁴, and the radius, whose square they change by twice that, is small.
        np.testing.assert_allclose(deviates.numpy(), expected, rtol=0, atol=4e-4)
        big = radius > 0.05
        np.testing.assert_allclose(deviates.numpy()[big], expected[big], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precise", [True, False])
def test_roots_are_rounded_correctly(precise: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Also from roots of half the bits, as MKL may give."""
    numbers = np.append(rng.lognormal(0, 4, 100_000), [0, 1, 2.0**-24]).astype(np.float32)
    if not precise:
        exact = Tensor.sqrt
        monkeypatch.setattr(Tensor, "sqrt", lambda x: exact(x) * (1 + 2.0**-26))
    np.testing.assert_array_equal(counter_random._sqrt(torch.from_numpy(numbers)).numpy(), np.sqrt(numbers))


def drawn(rows: int, columns: int, seed: int = 1, name: str = "a", **start: int) -> Tensor:
    out = torch.full((rows, columns), float("nan"))
    fill_normal(out, 1.0, seed=seed, name=name, **start)
    return out


@pytest.mark.parametrize("piece", [5, 37, 1 << 17])
def test_any_part_is_drawn_alone(piece: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    matrix = drawn(29, 53)
    monkeypatch.setattr(counter_random, "_PIECE_ON_CPU", piece)
    for _ in range(10):
        top, bottom = sorted(rng.integers(0, 30, 2).tolist())
        left, right = sorted(rng.integers(0, 54, 2).tolist())
        part = drawn(bottom - top, right - left, first_row=top, first_column=left)
        assert torch.equal(part, matrix[top:bottom, left:right])


def test_no_more_than_a_piece_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = counter_random._draw

    def spy(draw: counter_random.Draw, shape: torch.Size, *args: object) -> Tensor:
        sizes.append(shape.numel())
        return original(draw, shape, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(counter_random, "_draw", spy)
    monkeypatch.setattr(counter_random, "_PIECE_ON_CPU", 64)
    drawn(30, 20), drawn(2, 300)
    assert max(sizes) <= 64
    assert sum(sizes) == 1200


def test_uniform_numbers_are_philoxs_upper_bits_and_the_same_in_parts() -> None:
    matrix = torch.empty(200, 301)
    fill_uniform(matrix, 0.25, seed=5, name="layer")
    assert -0.25 <= matrix.min() < -0.2499
    assert 0.2499 < matrix.max() < 0.25
    assert abs(float(matrix.mean())) < 0.25 / 3**0.5 / matrix.numel() ** 0.5 * 4
    assert float(matrix.std()) == pytest.approx(0.25 / 3**0.5, rel=0.01)
    part = torch.empty(7, 50)
    fill_uniform(part, 0.25, seed=5, name="layer", first_row=90, first_column=203)
    assert torch.equal(part, matrix[90:97, 203:253])
    digest = hashlib.sha256(b"5/layer").digest()
    key = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12)]
    bits = [int(word) for word in philox(words(25, 90, key[2], key[3]), (key[0], key[1]))]  # of columns 100 to 103
    expected = {0.25 * ((word >> 8) / 2**23 - 1) for word in bits}
    assert {float(value) for value in matrix[90, 100:104]} == expected


def test_a_part_of_a_larger_tensor_is_filled_and_nothing_beside_it() -> None:
    around = torch.zeros(6, 9)
    fill_normal(around[1:4, 2:7], 0.5, seed=1, name="a")
    assert torch.equal(around[1:4, 2:7], 0.5 * drawn(3, 5))
    around[1:4, 2:7] = 0
    assert not around.any()


def test_positions_beyond_32_bits_of_elements() -> None:
    """Every matrix of a model has fewer rows, and fewer columns, than a word can count."""
    far = drawn(4, 8, first_row=2**32 - 4, first_column=2**33)
    assert torch.equal(far, drawn(4, 8, first_row=2**32 - 4, first_column=2**33))
    assert not torch.isin(far, drawn(64, 64)).any()


@pytest.fixture(scope="module")
def sample() -> Doubles:
    return drawn(1024, 1024).double().numpy()


def test_moments(sample: Doubles) -> None:
    """Within five standard errors."""
    size = sample.size
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10395 - 225)}.items():
        assert abs((sample**power).mean() - mean) < 5 * (variance / size) ** 0.5, power


def test_distribution(sample: Doubles) -> None:
    """Kolmogorov and Smirnov's distance (its 99.99 % quantile is 2.23 / √n), for all and for each of four columns that
    come from one counter."""
    for part in (sample, *(sample[:, lane::4] for lane in range(4))):
        expected = torch.special.ndtr(torch.from_numpy(np.sort(part, None))).numpy()
        ranks = np.arange(part.size + 1) / part.size
        distance = max((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
        assert distance < 2.23 / part.size**0.5


def test_tails(sample: Doubles) -> None:
    for bound in (2.0, 3.0, 4.0, 4.5):
        expected = sample.size * 2 * torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64)).item()
        assert abs((np.abs(sample) > bound).sum() - expected) < 5 * expected**0.5, bound


def test_neighbours_names_and_seeds_are_independent(sample: Doubles) -> None:
    """Values, and their squares, which Box and Muller's pairs share a radius in, are uncorrelated: five standard
    errors."""
    small = sample[:512, :512]
    others = {
        "next column": (small[:, :-1], small[:, 1:]),
        "next counter": (small[:, :-4], small[:, 4:]),
        "next row": (small[:-1], small[1:]),
        "diagonal": (small[:-1, :-4], small[1:, 4:]),
        "transposed": (small, small.T),
        "other name": (small, drawn(512, 512, name="b").double().numpy()),
        "other seed": (small, drawn(512, 512, seed=2).double().numpy()),
    }
    for what, (one, two) in others.items():
        for power in (1, 2):
            correlation = np.corrcoef(one.ravel() ** power, two.ravel() ** power)[0, 1]
            pairs = one.size / 2 if what == "transposed" else one.size
            assert abs(correlation - (what == "transposed") / 512) < 5 / pairs**0.5, (what, power)


def test_the_function_is_kept() -> None:
    """Another function of seed and name would change every figure that was published."""
    digest = hashlib.sha256(b"1/a").digest()
    key0, key1, word2, word3 = (int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4))
    bits = philox_by_hand((0, 0, word2, word3), (key0, key1))
    expected = []
    for radius_word, angle_word in (bits[:2], bits[2:]):
        radius, angle = (-2 * np.log((radius_word + 0.5) / 2**32)) ** 0.5, (angle_word - 2**31) / 2**31 * np.pi
        expected += [radius * np.cos(angle), radius * np.sin(angle)]
    weights = drawn(1, 4)[0].tolist()
    assert weights == pytest.approx(expected, abs=1e-6)
    assert weights == [-0.7120152115821838, 0.7084662914276123, 0.1673126369714737, -0.43779444694519043]

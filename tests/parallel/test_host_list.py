"""Slurm's compressed host lists against what they were compressed from."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.parallel.host_list import expand_hosts


@st.composite
def bracket(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(text, numbers) of one bracket."""
    text, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        width = draw(st.integers(1, 4))
        first = draw(st.integers(0, 10**width - 1))
        count = draw(st.integers(1, 12))
        text.append(f"{first:0{width}d}" + (f"-{first + count - 1}" if count > 1 or draw(st.booleans()) else ""))
        number = str(first).zfill(width)
        for _ in range(count):  # by hand, as a person counts on paper
            numbers.append(number)
            number = str(int(number) + 1).zfill(width)
    return f"[{','.join(text)}]", numbers


@st.composite
def host(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(text, hosts) between two commas."""
    word = st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True)
    text, names = draw(word), None
    names = [text]
    for _ in range(draw(st.integers(0, 2))):
        more, numbers = draw(bracket())
        suffix = draw(st.one_of(st.just(""), word))
        text += more + suffix
        names = [name + number + suffix for name in names for number in numbers]
    return text, names


@given(st.lists(host(), min_size=1, max_size=4))
def test_equals_brute_force(hosts: list[tuple[str, list[str]]]) -> None:
    assert list(expand_hosts(",".join(text for text, _ in hosts))) == [name for _, names in hosts for name in names]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[01-03,7],gpu5", "node01 node02 node03 node7 gpu5"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("rack[1-2]n[01-02]-ib", "rack1n01-ib rack1n02-ib rack2n01-ib rack2n02-ib"),
        ("10.77.0.[1-2]", "10.77.0.1 10.77.0.2"),
        ("login", "login"),
    ],
)
def test_lists_as_slurm_writes_them(text: str, hosts: str) -> None:
    assert list(expand_hosts(text)) == hosts.split()


def test_the_first_of_very_many_costs_nothing() -> None:
    assert next(expand_hosts("node[1-2]x," * 100_000 + "end")) == "node1x"


@pytest.mark.parametrize(
    "text", ["", "a,,b", "a[1-2", "a1-2]", "a[]", "a[1-]", "a[-3]", "a[3-1]", "a[x]", "a[1 -2]", "a[[1]]", "a b", ","]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        list(expand_hosts(text))

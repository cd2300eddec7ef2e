"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_pytorch_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("plain_pytorch_loop", EXAMPLES / "plain_pytorch_loop.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d is followed by %d. " % (i, i + 1) for i in range(900)))
    n_blocks = (text.stat().st_size - 1) // example.SEQ_LENGTH
    visits = example.main(str(text))
    assert visits.total() == 4 * n_blocks  # four epochs' worth
    assert set(visits) == set(range(n_blocks))
    assert max(visits.values()) > min(visits.values())  # Focus chose
    ends = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in ends] == ["learn", "focus", "review", "focus", "review"]
    assert float(ends[-1].split()[-1]) < 0.7 * float(ends[0].split()[-1])

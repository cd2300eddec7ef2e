"""Output that is no UTF-8 terminal: closed, a pipe without a reader, a disk without room, ASCII, few columns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lfr.output import number, print_table

PROGRAM = """
import sys
from megatron_lfr import output
output.prepare()
file = open(sys.argv[1], "w")  # takes the first free descriptor
for i in range(20000):
    print("zeile ä", i)
print("fehler ä", file=sys.stderr)
sys.stdout.flush()
print("done", file=file)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "| true", "2>&1 | true"])
def test_a_reader_that_is_gone_ends_nothing(closed: str, unbuffered: str, tmp_path: Path) -> None:
    script = f'set -o pipefail; "$0" -c "$1" "$2" {closed}'
    command = ["bash", "-c", script, sys.executable, PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "done\n"
    assert done.stderr.decode() == ("fehler ä\n" if "2>" not in closed else "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_an_error_of_the_command(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "megatron_lfr", "--help"]
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == "megatron-lfr: error: standard output: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_otherwise(encoding: str) -> None:
    program = (
        "from megatron_lfr import output; output.prepare()\n"
        "output.print_table(['domain', 'loss'], [['ä漢', '4.1234']], 'Verluste ä')"
    )
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True)
    out = done.stdout.decode(encoding)
    assert "4.1234" in out
    assert ("│" in out) == (encoding == "utf-8")
    assert ("ä" in out) == (encoding != "ascii")
    assert ("漢" in out) == (encoding == "utf-8")
    assert done.stderr == b""


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 400, None])
def test_no_number_is_cut(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    head = ["domain", *(f"after {i} review" for i in range(12))]
    rows = [[f"[red]a_domain_with_a_long_name_{d} :smile:", *(f"{d}.{i:04d}" for i in range(12))] for d in range(14)]
    print_table(head, rows, "Losses")
    out = capsys.readouterr().out
    assert "…" not in out
    for word in [cell for row in rows for cell in row] + head[1:] + ["Losses"]:
        assert word in out
    fits = columns in (400, None)
    assert len(out.splitlines()) == (14 + 5 if fits else 14 * 13 + 1)


@pytest.mark.parametrize(
    ("value", "text"), [(2.34567, "2.3457"), (3, "3.0000"), (None, "-"), (float("nan"), "-"), (True, "-"), ("2.5", "-")]
)
def test_a_loss_as_text(value: object, text: str) -> None:
    assert number(value) == text

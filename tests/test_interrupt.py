"""Ctrl-C, as a terminal sends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lfr.cli import COMMANDS, main

WAITS = """
import sys, threading, time
from megatron_lfr import cli
def command(words):
    try:
        print("ready", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print("cleaning", flush=True)
        time.sleep(float(words[0]))
        raise ImportError("that a module makes of it") from None
class Deaf:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(600)
def deaf(words):
    Deaf()
    time.sleep(600)
cli.COMMANDS.update(train=command, report=deaf)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(*words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    expect(process, "ready")
    return process


def expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"


def test_the_first_ends_a_command_with_one_line() -> None:
    process = start("train", "0")
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("cleaning\n", "megatron-lfr train: interrupted\n")
    assert process.returncode == 130


def test_the_second_leaves_at_once() -> None:
    process = start("train", "600")
    process.send_signal(signal.SIGINT)
    expect(process, "cleaning")
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT


def test_an_interrupt_inside_a_destructor_is_not_lost() -> None:
    process = start("report")
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "megatron-lfr report: interrupted\n")
    assert process.returncode == 130


def test_a_job_in_the_background_ignores_it() -> None:
    program = (
        "import os, signal; from megatron_lfr import interrupt\n"
        "with interrupt.interruptible():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    )
    ignoring = ["bash", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, program]
    assert subprocess.run(ignoring, capture_output=True, text=True, check=True).stdout == "goes on\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_while_it_imports(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is imported before there is a handler: what the first import of a command meets becomes one line."""

    def interrupted(*arguments: object, **more: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("builtins.__import__", interrupted)
    code = main([command])
    monkeypatch.undo()
    assert code == 130
    assert capsys.readouterr().err == f"megatron-lfr {command}: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_preprocess_with_its_workers(workers: int, tmp_path: Path) -> None:
    """The terminal's signal goes to the whole group: no worker, thread or process, has a word to say."""
    row = json.dumps({"text": "some words " * 2000})
    (tmp_path / "a.jsonl").write_text((row + "\n") * 3000)
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "c"), "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_lfr", "preprocess", *flags, "--workers", str(workers), "--no-progress"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    partial = tmp_path / "c.partial"
    while process.poll() is None and not any(path.stat().st_size for path in partial.glob("*.bin*")):
        time.sleep(0.005)
    assert process.poll() is None, "ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "megatron-lfr preprocess: interrupted\n"
    assert not partial.exists()

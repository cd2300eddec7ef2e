"""Preprocessing that is killed goes on, and ends with the bytes of a run that was left alone."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.data.preprocess import command as preprocess
from megatron_lfr.data.preprocess import inputs
from megatron_lfr.data.preprocess.command import PreprocessConfig, Summary, run
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.waiting import wait_until

WORDS = ["the", "cat", "sat", "on", "höchst", "東京", "🙂", "x" * 50]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def corpus(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Write lines of three domains in a plain and in a compressed file; some are empty, some broken."""

    def lines(n: int) -> bytes:
        rows = [
            {"text": " ".join(rng.choice(WORDS, rng.integers(0, 30))), "domain": str(rng.choice(["web", "wiki", "b"]))}
            for _ in range(n)
        ]
        return b"".join(b"broken\n" if i % 17 == 9 else json.dumps(row).encode() + b"\n" for i, row in enumerate(rows))

    (folder / "a.jsonl").write_bytes(lines(60))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(60)))
    (folder / "c.jsonl").write_bytes(lines(40))
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks small and many, with a durable point after each."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 400)
    monkeypatch.setattr(preprocess, "_SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(preprocess, "_PAUSE", 0.0)


def die_at(event: int, config: PreprocessConfig) -> int | None:
    """Run in a child that kills itself just before its n-th write, fsync, rename or removal; return its exit code."""
    counted = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    def child() -> None:
        os.fsync = deadly(os.fsync)
        Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
        Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
        IndexedDatasetWriter._append = deadly(IndexedDatasetWriter._append)  # type: ignore[method-assign]
        run(config)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def noted(out: Path) -> dict[str, Any] | None:
    path = out / "c.partial" / "progress.state"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(("domain_key", "sft"), [(None, False), ("domain", False), (None, True)])
def test_killed_at_random_events(
    tmp_path: Path,
    out: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    domain_key: str | None,
    sft: bool,
) -> None:
    """With --sft, the mask is as that of a run that was left alone, too."""
    eager(monkeypatch)
    (tmp_path / "whole").mkdir()
    files = corpus(tmp_path, rng)
    options: dict[str, Any] = {
        "domain_key": domain_key,
        "skip_broken": True,
        "workers": 1,
        "progress": False,
        "sft": sft,
        "prompt_key": "domain",
        "response_key": "text",
    }
    expected = run(PreprocessConfig(files, tmp_path / "whole" / "c", "bytes", **options))
    assert expected.broken == {"not JSON": 8}
    config = PreprocessConfig(files, out / "c", "bytes", **options)
    places = []
    while (code := die_at(int(rng.integers(2, 120)), config)) != 0:
        assert code == -signal.SIGKILL
        places.append((noted(out) or {"place": {"input": 0}})["place"]["input"])
        assert len(places) < 200
    assert len(places) >= 5
    assert {0, 1, 2} <= set(places)  # killed in each of the files
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("event", range(1, 33))
def test_killed_at_any_event_of_the_end(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, event: int) -> None:
    """One chunk of two domains takes 2 writes, 6 fsyncs to seal, 3 events of the note, 14 of the names, 7 to clean up.

    What is noted needs no second --overwrite.
    """
    monkeypatch.setattr(preprocess, "_SECONDS_BETWEEN_NOTES", 1e9)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "d": "x"}\n{"text": "bc", "d": "y"}\n')
    (out / "c_x_text_document.idx").write_bytes(b"of an older run")
    options = {"domain_key": "d", "workers": 1, "progress": False}
    config = PreprocessConfig([tmp_path / "a.jsonl"], out / "c", "bytes", overwrite=True, **options)
    before = 4  # the settings are written first: no older progress, an fsync, a rename, the folder's fsync
    assert die_at(before + event, config) == -signal.SIGKILL
    is_noted = 11 <= event <= 30
    assert (noted(out) or {}).get("sealed") if is_noted else noted(out) is None
    summary = run(replace(config, overwrite=not is_noted))
    assert [(p.domain, p.documents, p.tokens) for p in summary.prefixes] == [("x", 1, 2), ("y", 1, 3)]
    assert [p.prefix for p in summary.prefixes] == [out / "c_x_text_document", out / "c_y_text_document"]
    files = contents(out)
    assert sorted(files) == [
        f"c_{domain}_text_document{suffix}" for domain in "xy" for suffix in (".bin", ".idx", ".meta")
    ]
    (tmp_path / "whole").mkdir()
    run(replace(config, output_prefix=tmp_path / "whole" / "c"))
    assert files == contents(tmp_path / "whole")


def test_killed_with_workers_which_go_too(tmp_path: Path, out: Path, rng: np.random.Generator) -> None:
    """A real process with two worker processes is killed from outside at random moments."""
    (tmp_path / "whole").mkdir()
    files = corpus(tmp_path, rng)
    run(PreprocessConfig(files, tmp_path / "whole" / "c", "bytes", skip_broken=True, workers=1, progress=False))
    program = f"""
import sys, time
from pathlib import Path
from megatron_lfr.data.preprocess import inputs, pool, command as preprocess
pool._MOST_THREADS = 1
inputs.CHUNK_BYTES, preprocess._SECONDS_BETWEEN_NOTES, preprocess._PAUSE = 400, 0.0, 0.0
add = preprocess.Output.add
def slow(output, encoded):
    time.sleep(0.05)
    add(output, encoded)
if __name__ == "__main__":
    if sys.argv[-1] == "slow":
        preprocess.Output.add = slow
        del sys.argv[-1]
    files = [Path(name) for name in sys.argv[1:]]
    preprocess.run(preprocess.PreprocessConfig(
        files, Path({str(out / "c")!r}), "bytes", skip_broken=True, workers=2, progress=False
    ))
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(Path(preprocess.__file__).parents[3])}
    places = []
    for _ in range(2):
        before = noted(out)
        process = subprocess.Popen([*command, "slow"], env=environment)
        assert wait_until(lambda: noted(out) != before, lambda: process.poll() is None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.3))
        workers = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert len(workers) >= 2
        wait_until(lambda: not any(map(alive, workers)))  # noqa: B023
        state = noted(out)
        assert state is not None
        places.append((state["place"]["input"], state["place"]["offset"]))
    assert (0, 0) < places[0] < places[1]  # the second run went on from where the first was
    subprocess.run(command, check=True, env=environment)
    assert contents(out) == contents(tmp_path / "whole")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.fixture
def unfinished(tmp_path: Path, out: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files of a run that was killed after some chunks."""
    eager(monkeypatch)
    files = corpus(tmp_path, rng)
    assert die_at(60, PreprocessConfig(files, out / "c", "bytes", **OPTIONS)) == -signal.SIGKILL
    state = noted(out)
    assert state is not None
    assert state["place"]["offset"] > 0
    assert state["broken"]
    return files


OPTIONS: dict[str, Any] = {"skip_broken": True, "workers": 1, "progress": False}


def finish(files: list[Path], out: Path, tokenizer: str = "bytes", **options: Any) -> Summary:
    return run(PreprocessConfig(files, out / "c", tokenizer, **{**OPTIONS, **options}))


def test_other_inputs_or_settings_are_refused(unfinished: list[Path], out: Path, bpe_file: Path) -> None:
    before = contents(out / "c.partial")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("--tokenizer: bytes then, sha256", {"tokenizer": str(bpe_file)}),
        ("--json-key: text then, domain now", {"json_key": "domain"}),
        ("--domain-key: None then, domain now", {"domain_key": "domain"}),
        ("end-of-document token: 256 then, None now", {"append_eod": False}),
        ("give --skip-broken", {"skip_broken": False}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message) as caught:
            finish(unfinished, out, **options)
        assert "--restart" in str(caught.value)
    with pytest.raises(ValueError, match="inputs: 3 then, 2 now"):
        finish(unfinished[:2], out)
    with pytest.raises(ValueError, match=r"inputs: .*b\.jsonl\.gz then, .*c\.jsonl now"):
        finish([unfinished[0], unfinished[2], unfinished[1]], out)
    os.utime(unfinished[2], ns=(0, 0))
    with pytest.raises(ValueError, match=r"inputs: .*c\.jsonl has changed since"):
        finish(unfinished, out)
    assert contents(out / "c.partial") == before


def test_restart_discards_what_was_done(unfinished: list[Path], out: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    finish([unfinished[0]], tmp_path / "whole")
    finish([unfinished[0]], out, restart=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.state", b"{"),
        ("progress.state", b"[]"),
        ("progress.state", b'{"sealed": null}'),
        ("progress.state", b'{"sealed": null, "place": {"input": 3}, "stored": 0, "broken": {}, "domains": []}'),
        ("progress.state", b'{"sealed": null, "place": {"offset": "x"}, "stored": 0, "broken": {}, "domains": []}'),
        ("run.state", b"[]"),
        ("c_text_document.bin", b""),
        ("c_text_document.lengths", b""),
        ("c_text_document.documents", None),
    ],
)
def test_a_damaged_folder_is_named(unfinished: list[Path], out: Path, name: str, content: bytes | None) -> None:
    path = out / "c.partial" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.partial: the unfinished run in it is damaged .*--restart"):
        finish(unfinished, out)


def test_a_folder_of_someone_else_is_left_alone(unfinished: list[Path], out: Path) -> None:
    (out / "d.partial").mkdir()
    (out / "d.partial" / "thesis").write_text("mine")
    with pytest.raises(ValueError, match=r"d\.partial: is in the way"):
        run(PreprocessConfig(unfinished, out / "d", "bytes", restart=True, **OPTIONS))
    assert contents(out / "d.partial") == {"thesis": b"mine"}


def test_two_at_once_are_refused(unfinished: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = preprocess.Output.add
    seen = []

    def second_run(output: Any, encoded: Any) -> None:
        if not seen:
            with pytest.raises(ValueError, match="another process is working on this output") as caught:
                finish(unfinished, out, restart=True)
            seen.append(caught)
        add(output, encoded)

    monkeypatch.setattr(preprocess.Output, "add", second_run)
    finish(unfinished, out)
    assert len(seen) == 1
    assert sorted(contents(out)) == ["c_text_document.bin", "c_text_document.idx", "c_text_document.meta"]


def test_an_error_keeps_what_is_noted(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late line is broken: with --skip-broken the run goes on from there, not from the start."""
    eager(monkeypatch)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 100 + "broken\n" + '{"text": "last"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:101: not JSON") as raised:
        finish([path], out, skip_broken=False)
    state = noted(out)
    assert state is not None
    assert state["place"]["lines"] > 50
    assert raised.value.__notes__ == [f"what is done so far is kept in {out}/c.partial"]
    path_reads = []
    parts = preprocess.inputs.LineReader.parts

    def watched(reader: Any, offset: int, lines: int, part_bytes: int) -> Any:
        path_reads.append(lines)
        return parts(reader, offset, lines, part_bytes)

    monkeypatch.setattr(preprocess.inputs.LineReader, "parts", watched)
    summary = finish([path], out)
    assert path_reads == [state["place"]["lines"]]
    assert (summary.prefixes[0].documents, summary.broken) == (101, {"not JSON": 1})

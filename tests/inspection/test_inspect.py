"""`megatron-lfr inspect` on a run whose losses, order and text are known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lfr.analysis.replay import open_run
from megatron_lfr.analysis.spikes import WINDOW, find_spikes, running_median
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.lfr import Curriculum, Journal, Phase, Schedule, preset
from megatron_lfr.lfr.identity import FORMAT, describe_segments
from megatron_lfr.output import visible

SEQ, BATCH, SPIKE_STEP = 16, 4, 30


def loss_of(block: int, step: int) -> float:
    return 5.0 - 0.01 * step + 0.01 * (block % 7) + (4.0 if step == SPIKE_STEP else 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), preset("lfr"))


def make_run(folder: Path, schedule: Schedule) -> Path:
    """Return a run folder over two domains of text in bytes; documents hold 23 tokens, the last one ends it."""
    prefixes = []
    for domain in ("alpha", "beta"):
        prefix = folder / f"toy_{domain}_text_document"
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for number in range(60):
                text = f"{domain:5} \x1b[31m doc {number:06d}".encode()[:22].ljust(22, b".")
                writer.add_document(np.append(np.frombuffer(text, np.uint8), 256).astype(np.uint16))
        prefixes.append(str(prefix))
    dataset = BlockDataset(prefixes, SEQ, "9,1,0")
    plan = schedule.plan(dataset.train.num_blocks, SEQ, BATCH, train_epochs=2.5)
    identity = {
        "format": FORMAT,
        "seed": 1,
        "seq_length": SEQ,
        "corpus": dataset.digests(),
        "segments": describe_segments(plan),
    }
    curriculum = Curriculum(plan, Journal(folder / "journal", identity), 1)
    served = []
    for step, ids in curriculum.steps():
        losses = np.array([loss_of(block, step + 1) for block in ids], np.float32)
        curriculum.record(step, losses, np.ones(BATCH, np.float32))
        served.append(ids[ids >= 0].tolist())
    curriculum.state_dict()
    config = {"data_path": prefixes, "split": "9,1,0", "tokenizer_model": "bytes", "eod_token": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    norms = [1.0 + 0.01 * (step % 3) for step in range(1, plan.total_steps + 1)]
    norms[40] = 9.0
    rows = [
        {"event": "train", "step": i + 1, "phase": plan.at_step(i).index, "grad_norm": norm}
        for i, norm in enumerate(norms)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "served.json").write_text(json.dumps(served))
    return folder


def served(folder: Path) -> list[list[int]]:
    blocks: list[list[int]] = json.loads((folder / "served.json").read_text())
    return blocks


def ask(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", str(folder), *words]) == 0
    return capsys.readouterr().out


def expected_text(folder: Path, block: int) -> str:
    """Return a block's bytes, read from the file by hand: documents of 23 tokens, blocks of 16."""
    per_domain = (54 * 23 - 1) // SEQ
    domain, number = divmod(block, per_domain)
    prefix = folder / f"toy_{('alpha', 'beta')[domain]}_text_document.bin"
    tokens = np.fromfile(prefix, np.uint16)[number * SEQ : (number + 1) * SEQ + 1]
    return bytes(tokens[tokens < 256].astype(np.uint8)).decode().replace("\x1b", "\\x1b")


def test_a_step_leads_to_its_blocks_documents_and_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = 75
    out = ask(folder, capsys, "--step", str(step))
    assert "\x1b" not in out
    blocks = served(folder)[step - 1]
    shown = re.findall(r"block (\d+) \((\w+), documents? (\d+)(?: to (\d+))?\): loss (\S+), (.*)\n    (.*)\n", out)
    assert sorted(int(row[0]) for row in shown) == sorted(blocks)
    losses = [float(row[4]) for row in shown]
    assert losses == sorted(losses, reverse=True)
    for block_text, domain, first, last, loss, before, text in shown:
        block = int(block_text)
        assert float(loss) == pytest.approx(loss_of(block, step), abs=1e-4)
        earlier = [s for s in range(1, step) if block in served(folder)[s - 1]]
        assert before == f"before {loss_of(block, earlier[-1]):.4f} at step {earlier[-1]}"
        assert text == expected_text(folder, block)
        assert domain == ("alpha", "beta")[block // 77]
        start = block % 77 * SEQ
        assert (int(first), int(last or first)) == (start // 23, (start + SEQ) // 23)


def test_spikes_are_found_and_the_worst_is_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ask(folder, capsys, "--spikes")
    rows = re.findall(r"│ +(\d+) │ (\d \w+) +│ (\w+) +│ +([\d.]+) │", out)
    assert sorted((row[0], row[2]) for row in rows) == [("30", "loss"), ("41", "grad_norm")]
    assert f"step {rows[0][0]}, phase {rows[0][1]}: 4 blocks" in out
    assert sorted(map(int, re.findall(r"block (\d+) \(", out))) == sorted(served(folder)[int(rows[0][0]) - 1])
    assert len(find_spikes(open_run(folder), 1e9)) == 0
    assert "no step is more than 1e+09" in ask(folder, capsys, "--spikes", "--deviations", "1e9")


def test_running_median_against_a_plain_loop(rng: np.random.Generator) -> None:
    for n in (1, 2, 9, 51, 52, 200):
        values = rng.normal(size=n)
        median, deviation = running_median(values)
        for i in range(n):
            first = min(max(0, i - min(WINDOW, n) // 2), n - min(WINDOW, n))
            around = values[first : first + WINDOW]
            assert median[i] == np.median(around)
            assert deviation[i] == pytest.approx(1.4826 * np.median(np.abs(around - np.median(around))))


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_the_history_of_a_block(folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    block, path = 20, tmp_path / f"out{suffix}"
    out = ask(folder, capsys, "--block", str(block), "--output", str(path))
    steps = [s + 1 for s, ids in enumerate(served(folder)) for i in ids if i == block]
    assert [int(s) for s in re.findall(r"step +(\d+) ", out)] == steps
    assert expected_text(folder, block) in out
    if suffix == ".npy":
        records = np.load(path, allow_pickle=False)
        rows = [dict(zip(records.dtype.names, row, strict=True)) for row in records.tolist()]
    else:
        rows = json.loads(path.read_text())
    assert [row["step"] for row in rows] == steps
    assert [row["nll"] for row in rows] == pytest.approx([loss_of(block, s) for s in steps], abs=1e-6)
    assert {row["block"] for row in rows} == {block}


def test_what_each_focus_did_with_a_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decisions = set()
    for history in open_run(folder).phases():
        if history.selection is None:
            continue
        left_out, easiest = (mask(history.scores) for mask in (history.selection.left_out, history.selection.easiest))
        for block in (3, 20, 77, 150):
            out = ask(folder, capsys, "--block", str(block))
            line = next(line for line in out.split("\n") if f" phase {history.planned.index} focus" in line)
            end = "easiest" if easiest[block] else "hardest"
            expected = f"left out as one of the {end}" if left_out[block] else "kept"
            decisions.add(expected)
            assert expected in line
            assert f"score {history.scores[block]:.4f}" in line
    assert len(decisions) > 1


def test_a_block_that_explore_draws_is_said_to_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule((Phase("learn", 0.6, "share"), Phase("focus", 0.4, "share", drop=0.5, explore=0.5)))
    folder = make_run(tmp_path, schedule)
    history = list(open_run(folder).phases())[1]
    assert history.selection is not None
    left_out, drawn = history.selection.left_out(history.scores), set(history.block_ids.tolist())
    lines = {}
    for block in np.flatnonzero(left_out)[:12].tolist():
        out = ask(folder, capsys, "--block", str(block))
        lines[block] = next(line for line in out.split("\n") if " phase 1 focus" in line and "score" in line)
    assert {block in drawn for block in lines} == {True, False}
    for block, line in lines.items():
        assert "left out as one of the easiest" in line
        assert line.endswith(", but drawn at random (explore)") == (block in drawn)


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_records_replace_records_alone(
    folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / f"out{suffix}", set()
    for words in (["--block", "20"], ["--step", "2"], ["--spikes"], ["--domain", "beta"], ["--hardest", "2"]):
        ask(folder, capsys, *words, "--output", str(path))
        written.add(path.read_bytes())
    assert len(written) == 5
    if suffix == ".npy":
        np.save(path, np.zeros(3, np.float32))
    else:
        path.write_text('{"text": "of a corpus"}')
    other = path.read_bytes()
    assert main(["inspect", str(folder), "--block", "20", "--output", str(path)]) == 2
    assert "holds something else already; remove it" in capsys.readouterr().err
    assert path.read_bytes() == other


def test_hardest_easiest_and_domains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = open_run(folder).ledger().detrended_scores()
    ranked = sorted(set(np.flatnonzero(~np.isnan(scores)).tolist()), key=lambda i: (scores[i], i))
    easiest = re.findall(r"block (\d+)", ask(folder, capsys, "--easiest", "5", "--chars", "0"))
    assert list(map(int, easiest)) == ranked[:5]
    shown = re.findall(
        r"block (\d+) .*loss ([\d.]+) at step (\d+) \(amounts to ([\d.]+) now\)", ask(folder, capsys, "--hardest", "3")
    )
    last = {i: (loss_of(i, s + 1), s + 1) for s, ids in enumerate(served(folder)) for i in ids}
    for (block, loss, step, score), expected in zip(shown, reversed(ranked[-3:]), strict=True):
        assert scores[int(block)] == scores[expected]
        assert (float(loss), int(step)) == (pytest.approx(last[int(block)][0], abs=1e-4), last[int(block)][1])
        assert float(score) == pytest.approx(scores[expected], abs=1e-4)
    rows = re.findall(r"│ (\d) \w+ +│ +([\d,]+) │ +([\d,]+) │ +([\d.]+) │", ask(folder, capsys, "--domain", "beta"))
    plan = open_run(folder).plan
    for phase, visits, blocks, mean in rows:
        planned = plan.phases[int(phase)]
        members = [
            (i, loss_of(i, s + 1))
            for s in range(planned.first_step, planned.end_step)
            for i in served(folder)[s]
            if i >= 77
        ]
        assert (int(visits), int(blocks)) == (len(members), len({i for i, _ in members}))
        assert float(mean) == pytest.approx(np.mean([x for _, x in members]), abs=1e-4)
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --step, --spikes"),
        (["--step", "3", "--spikes"], "not --step and --spikes"),
        (["--step", "0"], "--step 0: must be at least 1"),
        (["--step", "5000"], "step 5000: .*recorded steps: 1 to 9"),
        (["--block", "154"], "--block 154: the run's blocks are 0 to 153"),
        (["--domain", "gamma"], "--domain gamma: choose from alpha, beta"),
        (["--step", "1", "--output", "x.csv"], "must end in .npy or .json"),
        (["--step", "1", "--data-path", "{folder}/toy_beta_text_document"], "not the corpus that"),
    ],
)
def test_errors_name_what_is_wrong(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), *(word.format(folder=folder) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_could_drive_a_terminal_is_spelled_out() -> None:
    assert visible("a\x1b[2J\r\n\u202e\x9b\u2028é漢") == "a\\x1b[2J\\r\\n\\u202e\\x9b\\u2028é漢"


def test_it_answers_without_torch(folder: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # any import of it fails
from megatron_lfr.inspection.views import View
from megatron_lfr.analysis.replay import open_run
from megatron_lfr.run_folder import open_corpus
run = open_run(sys.argv[1])
View(run, open_corpus(run.folder), 16, 200).spikes(6.0)
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert "grad_norm" in done.stdout, done.stderr

"""Runs over a corpus with a loss mask: the losses of blocks are those of their responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.evaluation.trained import load_trained
from megatron_lfr.parallel import session
from support.text_run_oracle import Oracle
from support.tiny_run import STOPPED, tiny_flags

SEQ, EOD = 16, 63
Record = tuple[list[int], int]
"""Tokens with their end, and how many of the first are a prompt."""


def write(prefix: Path, records: list[Record]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16, masked=True) as writer:
        for tokens, prompt in records:
            writer.add_document(np.array(tokens, np.uint16), np.arange(len(tokens)) >= prompt)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Write two prefixes, whose folder is in the keys. A long prompt leaves blocks without a response."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(7)
    domains: dict[str, list[Record]] = {}
    for name in ("easy", "hard"):
        records: list[Record] = []
        for number in range(60):
            prompt = 90 if number == 20 else int(rng.integers(2, 14))
            response = int(rng.integers(1, 8))
            tokens = rng.integers(0, 60, prompt + response)
            if name == "easy":
                tokens[prompt:] = 7
            records.append(([*tokens.tolist(), EOD], prompt))
        domains[str(folder / f"toy_{name}_text_document")] = records
        write(Path(list(domains)[-1]), records)
    return domains


def blocks(records: list[Record], first: int, last: int) -> list[tuple[list[int], list[bool]]]:
    """Return tokens [SEQ + 1] and which labels count [SEQ] of the blocks of some documents, plainly."""
    tokens = [token for document, _ in records[first:last] for token in document]
    counts = [at >= prompt for document, prompt in records[first:last] for at in range(len(document))]
    cut = [(tokens[s : s + SEQ + 1], counts[s + 1 : s + SEQ + 1]) for s in range(0, len(tokens) - SEQ, SEQ)]
    return [block for block in cut if any(block[1])]


def expected_losses(run: Path, domains: dict[str, list[Record]], bounds: tuple[int, int]) -> list[tuple[float, int]]:
    """Return (sum of the losses of the tokens that count, their number) of each block, by transformers in fp64."""
    with session():
        oracle = Oracle(load_trained(run, None, None, None))
        losses = []
        for records in domains.values():
            for tokens, counts in blocks(records, *bounds):
                logprobs = oracle.logprobs(tokens[:-1])
                nll = -logprobs[torch.arange(SEQ), torch.tensor(tokens[1:])]
                losses.append((float(nll[torch.tensor(counts)].sum()), sum(counts)))
    return losses


def test_losses_are_those_of_responses(
    domains: dict[str, list[Record]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the journal, the logs, evaluations and files of losses. The weights hardly move."""
    run = tmp_path / "run"
    flags = [*tiny_flags(list(domains)), "--save", str(run), "--lr", "1e-9", "--train-epochs", "1"]
    flags += ["--lfr-schedule", "uniform", "--eval-iters", "None", "--log-interval", "1"]
    assert main(["train", *flags]) == 0
    training = expected_losses(run, domains, (0, 54))
    stored = [sum(len(tokens) for tokens, _ in records[:54]) for records in domains.values()]
    left_out = sum((tokens - 1) // SEQ for tokens in stored) - len(training)
    assert left_out >= 8
    out = capsys.readouterr().out
    assert f"{left_out} blocks in which nothing is trained on, by the loss mask, are left out" in out
    means = [nll / count for nll, count in training]
    opened = open_run(run)
    assert opened.ledger().nll.tolist() == pytest.approx(means, abs=1e-5)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    visits = opened.visits_at(1)["block"].tolist()
    of_step = [sum(training[block][part] for block in visits) for part in range(2)]
    logged = next(row for row in rows if row["event"] == "train")
    assert logged["loss"] == pytest.approx(of_step[0] / of_step[1], abs=1e-5)
    assert logged["last_loss"] == pytest.approx(of_step[0] / of_step[1], abs=1e-5)
    evaluation = [row for row in rows if row["event"] == "evaluation"][-1]
    held_out = expected_losses(run, domains, (54, 60))
    assert evaluation["tokens"] == sum(count for _, count in held_out)
    assert evaluation["loss"] == pytest.approx(sum(nll for nll, _ in held_out) / evaluation["tokens"], abs=1e-5)
    scores = ["--split", "train", "--per-block", str(tmp_path / "scores.npy")]
    assert main(["evaluate", "--run", str(run), *scores]) == 0
    assert np.load(tmp_path / "scores.npy").tolist() == pytest.approx(means, abs=1e-5)
    capsys.readouterr()
    assert main(["inspect", str(run), "--block", "3"]) == 0
    assert f", {training[3][1]} tokens trained on): visits: 1" in capsys.readouterr().out


def test_adapters_by_every_kind_of_score(domains: dict[str, list[Record]], tmp_path: Path) -> None:
    """Focus ranks by losses of responses alone, without one that is no number; the run resumes to the same."""
    base, flags = tmp_path / "base", tiny_flags(list(domains))
    assert main(["train", *flags, "--save", str(base), "--exit-interval", "2"]) == STOPPED
    schedule = "[{kind: learn, duration: 1}" + "".join(
        f", {{kind: focus, duration: 1, unit: passes, drop: 0.5, score: {score}}}"
        for score in ("recorded", "detrended", "rescored")
    )
    adapters = ["--load", str(base), "--finetune", "--lora-rank", "2", "--lora-alpha", "4", "--lora-target", "all"]
    words = ["train", *flags[:-4], *adapters, "--lfr-schedule", f"{schedule}]", "--save", str(tmp_path / "run")]
    assert main([*words, "--exit-interval", "9"]) == STOPPED
    assert main(words) == 0
    phases = list(open_run(tmp_path / "run").phases())
    assert [history.is_complete for history in phases] == [True] * 4
    for history in phases[1:]:
        assert np.isfinite(history.scores).all()
        left_out = history.selection.left_out(history.scores)  # type: ignore[union-attr]
        easy = left_out[: len(blocks(domains[next(iter(domains))], 0, 54))]
        assert easy.mean() > left_out[len(easy) :].mean()  # the same token each time is soon learned


def test_masked_records_extend_a_run_of_plain_text(
    domains: dict[str, list[Record]], corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each new block has the loss of its responses alone, and a change of their mask is noticed."""
    run, new = tmp_path / "run", str(tmp_path / "new_text_document")
    records = next(iter(domains.values()))
    write(Path(new), records)
    flags = [*tiny_flags(corpus)[:-4], "--lr-decay-style", "constant", "--lfr-schedule", "uniform", "--lr", "1e-9"]
    assert main(["train", *flags, "--train-iters", "2", "--save", str(run)]) == 0
    assert main(["extend", "--run", str(run), "--data-path", *corpus, new, "--train-iters", "+9"]) == 0
    go_on = ["train", "--config", str(run / "config.yaml"), "--save", str(run)]
    assert main([*go_on, "--exit-interval", "4"]) == STOPPED
    write(Path(new), [(tokens, max(1, prompt - 1)) for tokens, prompt in records])
    assert main(go_on) == 2
    assert "--data-path: prefix 3 of 3 is not the run's, or has changed" in capsys.readouterr().err
    write(Path(new), records)
    assert main([*go_on, "--exit-interval", "None"]) == 0
    expected = [nll / count for nll, count in expected_losses(run, {new: records}, (0, 54))]
    losses = open_run(run).ledger().nll[-len(expected) :]
    seen = ~np.isnan(losses)
    assert seen.sum() > 20
    assert losses[seen].tolist() == pytest.approx(np.array(expected)[seen].tolist(), abs=1e-5)


def test_another_mask_is_another_run(
    domains: dict[str, list[Record]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(next(iter(domains))).parent, tmp_path / "copy")
    prefixes = [str(tmp_path / "copy" / Path(prefix).name) for prefix in domains]
    words = ["train", *tiny_flags(prefixes), "--save", str(tmp_path / "run"), "--exit-interval"]
    assert main([*words, "2"]) == STOPPED
    records = [(tokens, max(1, prompt - 1)) for tokens, prompt in next(iter(domains.values()))]
    write(Path(prefixes[0]), records)
    assert main([*words, "4"]) == 2
    assert "--data-path" in capsys.readouterr().err
    Path(f"{prefixes[0]}.mask").write_bytes(Path(f"{prefixes[1]}.mask").read_bytes())
    assert main([*words, "4"]) == 2
    assert "is the mask of another .bin and .idx" in capsys.readouterr().err
    write(Path(prefixes[0]), next(iter(domains.values())))
    assert main([*words, "4"]) == STOPPED

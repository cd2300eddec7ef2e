"""A run may validate on another corpus than a part of the one that it trains on."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from megatron_lfr.cli import main
from support.indexed_samples import write_by_hand
from support.tiny_corpus import linked
from support.tiny_run import VOCAB, tiny_flags

FLAG = "--valid-data-path"


def evaluated(run: Path, *flags: str) -> dict[str, Any]:
    """Return what `evaluate` says of a run's corpus."""
    results = run.parent / "results.json"
    assert main(["evaluate", "--run", str(run), "--json", str(results), *flags]) == 0
    corpus: dict[str, Any] = json.loads(results.read_text())["corpus"]
    return corpus


def test_all_of_another_corpus_is_validated_on(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last validation of a run that names it by a relative path is what `evaluate` gives for the same documents,
    from another folder, too."""
    easy, hard = map(Path, corpus)
    monkeypatch.chdir(hard.parent)
    run = tmp_path / "run"
    flags = [*tiny_flags([str(easy)]), "--split", "100,0,0", FLAG, hard.name, "--save", os.path.relpath(run)]
    assert main(["train", *flags]) == 0
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["event"] == "evaluation"][-1]
    by_hand = evaluated(run, "--data-path", str(hard))
    assert last["tokens"] == by_hand["tokens"] == 16 * by_hand["blocks"]
    assert last["loss"] == pytest.approx(by_hand["loss"], rel=1e-6)
    assert evaluated(run) == {**by_hand, "split": "valid"}
    assert evaluated(run, "--split", "train")["domains"].keys() == {"toy_easy"}


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["{hard}"], r"--valid-data-path: --split 90,10,0 holds a part .* give --split 100,0,0"),
        (["2", "{hard}", "--split", "1"], "--valid-data-path: give prefixes without weights"),
        (["{easy}", "--split", "1"], "--valid-data-path .*easy_text_document: is in --data-path, too"),
        (["{linked}", "--split", "1"], "--valid-data-path .*links/other: is in --data-path, too"),
        (["{hard}s", "--split", "1"], "--valid-data-path .*hard_text_documents: "),
        (["{few}", "--split", "1"], "--valid-data-path .*few: .* hold 3 tokens, fewer than the 17"),
        (
            ["{other}", "--split", "1"],
            "--valid-data-path: --vocab-size 64: the corpus was made with t.json .* 65 tokens",
        ),
    ],
)
def test_what_cannot_be_validated_on_is_refused_by_name(
    corpus: list[str], tmp_path: Path, flags: list[str], error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    few, other = write_by_hand(tmp_path / "few", [[1, 2, 3]]), write_by_hand(tmp_path / "other", [[1] * 40])
    made = {"tokenizer": "t.json", "fingerprint": "sha256 1", "vocab_size": 65, "eod": None, "bos": None}
    made |= {"format": 1, "output_prefix": "c", "documents": 1, "tokens": 40}
    other.with_suffix(".meta").write_text(json.dumps(made))
    paths = {"easy": corpus[0], "hard": corpus[1], "few": few, "other": other}
    paths["linked"] = linked(corpus[0], tmp_path / "links")
    given = [flag.format(**paths) for flag in flags]
    assert main(["train", *tiny_flags(corpus[:1]), FLAG, *given, "--save", str(tmp_path / "run")]) == 2
    printed = capfd.readouterr()
    assert re.search(error, (printed.err + printed.out).replace("\n", " "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("starting", [0, 1])
def test_documents_of_both_begin_alike(tmp_path: Path, starting: int, capfd: pytest.CaptureFixture[str]) -> None:
    words = {str(i): i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<s>": 1, **words}, unk_token="2"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    documents = [[1] * (i == starting) + [7] * 40 for i in (0, 1)]
    corpus, other = (write_by_hand(tmp_path / f"c{i}", [document]) for i, document in enumerate(documents))
    flags = [*tiny_flags([str(corpus)]), "--split", "1", "--tokenizer-model", str(tmp_path / "t.json")]
    assert main(["train", *flags, FLAG, str(other), "--save", str(tmp_path / "run")]) == 2
    assert re.search(f"{FLAG}: either .* begin with a start-of-document", capfd.readouterr().err.replace("\n", " "))

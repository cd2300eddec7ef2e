"""The tokenizer that goes with a model: transformers' ids, the end of documents, and a run that trains."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_lfr.cli import main
from megatron_lfr.config import parse_run_config
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from support.hf_runs import BASE, edit, make_run, make_tokenizer

TEXTS = ["the quick  brown fox, 123 times", " leading\n\n\tcode():\n    return x", "Grüße, 日本語 🙂", "x  "]


def byte_level(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))


def sentence_pieces(path: Path) -> None:
    """As Llama 2's: spaces are characters, one is put before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    tokenizer.save(str(path))


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize(
    "beside",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "auto_map": {"AutoTokenizer": ["evil.T", None]}},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_bos_token": True, "chat_template": "{{ x }}"},
    ],
)
def test_transformers_cuts_texts_as_the_run_did(
    make: Callable[[Path], None], beside: dict[str, object] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    make(folder / "tokenizer.json")
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = load_tokenizer(str(folder))
    make_run(tmp_path / "run", replace(BASE, vocab_size=tokenizer.vocab_size), folder)
    flags = ("--run", str(tmp_path / "run"), "--output", str(tmp_path / "hf"))
    assert main(["convert", "to-hf", *flags, "--verify"]) == 0
    assert "tokens of 4 texts: as transformers'" in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert [loaded(text, add_special_tokens=False).input_ids for text in TEXTS] == tokenizer.encode_batch(TEXTS)
    assert loaded.eos_token == "</s>"
    assert set(loaded("x")) == {"input_ids", "attention_mask"}
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written.get("chat_template") == (beside or {}).get("chat_template")


def test_a_class_that_cuts_texts_in_another_way_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tmp_path / "hf"
    make_run(tmp_path / "run", replace(BASE, vocab_size=400))
    assert main(["convert", "to-hf", "--run", str(tmp_path / "run"), "--output", str(hf)]) == 0
    sentence_pieces(hf / "tokenizer.json")
    (hf / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert main(["convert", "from-hf", "--input", str(hf), "--output", str(tmp_path / "back"), "--verify"]) == 0
    assert "note: tokens of ' leading and  double spaces ' differ from those of transformers' Llama" in (
        capsys.readouterr().out
    )


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Return a folder with a model of 101 tokens and a tokenizer of words w0 to w99 and </s>, which ends documents."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", 101)
    make_run(tmp_path / "run", BASE, tokenizer)
    folder = tmp_path / "a folder"
    assert main(["convert", "to-hf", "--run", str(tmp_path / "run"), "--output", str(folder)]) == 0
    return folder


def end_token(hf: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str | None, list[str], list[str]]:
    """(--eod-token of the run that comes of a folder, notes, the commands that preprocess and train)."""
    run = hf.with_name("new run")
    capsys.readouterr()
    assert main(["convert", "from-hf", "--input", str(hf), "--output", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    config, _ = parse_run_config(["--config", str(run / "config.yaml")])
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    return config.data.eod_token, notes, lines[-2:]


@pytest.mark.parametrize(
    ("changes", "expected", "note"),
    [
        ({}, "</s>", None),
        (
            {"config.json": {"eos_token_id": [7, 100]}, "generation_config.json": {"eos_token_id": [7, 100]}},
            "</s>",
            None,
        ),
        (
            {"generation_config.json": {"eos_token_id": 8}},
            None,
            'which is its end-of-document token? its files disagree: tokenizer_config.json names "</s>" (id 100); '
            "generation_config.json names 8 (which is ",
        ),
        (
            {"config.json": {"eos_token_id": 128001}},
            None,
            "config.json names 128001 (which the vocabulary lacks); name it with --eod-token",
        ),
        (
            {"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [9]}},
            None,
            "its files disagree",
        ),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": {"content": "</s>"},
                    "added_tokens_decoder": {"101": {"content": "[PAD]"}, "100": {"content": "</s>"}},
                }
            },
            "</s>",
            "tokenizer_config.json adds '[PAD]', which tokenizer.json does not have: not used here",
        ),
    ],
)
def test_which_token_ends_documents(
    changes: dict[str, dict[str, object]],
    expected: str | None,
    note: str | None,
    hf: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, fields in changes.items():
        edit(hf / file, **fields)
    eod, notes, _ = end_token(hf, capsys)
    assert eod == expected
    assert [note in line for line in notes] == [True] if note else not notes


@pytest.mark.parametrize("is_named", [True, False])
def test_the_commands_that_are_printed_train(is_named: bool, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not is_named:
        words = {f"w{i}": i for i in range(101)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(hf / "tokenizer.json"))
        (hf / "tokenizer_config.json").unlink()
        for file in ("config.json", "generation_config.json"):
            edit(hf / file, eos_token_id=None)
    _, notes, commands = end_token(hf, capsys)
    assert ["no end-of-document token" in note for note in notes] == ([] if is_named else [True])
    (hf.parent / "corpus.jsonl").write_text((json.dumps({"text": "w5"}) + "\n") * 400)
    preprocess, train = (shlex.split(command.replace("TOKEN", "w100"))[1:-1] for command in commands)
    preprocess += ["--input", "corpus.jsonl", "--output-prefix", "c", "--no-progress"]
    train += ["--data-path", "c_text_document", "--save", "trained", "--lr", "1e-3", "--global-batch-size", "2"]
    with contextlib.chdir(hf.parent):
        assert main(preprocess) == 0
        assert main([*train, "--train-iters", "2", "--lfr-schedule", "uniform", "--eod-mask-loss"]) == 0
    assert (hf.parent / "trained" / "checkpoints" / "iter_0000002").is_dir()

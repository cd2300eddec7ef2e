"""Supervised records become documents of which the responses alone are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.sidecar import read_sidecar
from megatron_lfr.data.preprocess import command as preprocess
from megatron_lfr.data.preprocess import inputs as inputs_module
from megatron_lfr.data.preprocess import pool
from megatron_lfr.data.preprocess.command import PreprocessConfig, Summary, run

WriteJsonl = Callable[[str, Sequence[object]], Path]
Document = tuple[list[int], list[int]]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}[A]{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "the mat"},
    {"role": "user", "content": "that cat"},
    {"role": "assistant", "content": "is sat"},
    {"role": "user", "content": "on the mat?"},
    {"role": "assistant", "content": " the\n\ncat sat."},
]


def preprocess_records(path: Path, out: Path, tokenizer: object, **options: Any) -> Summary:
    options = {"workers": 1, "sft": True, "progress": False, **options}
    return run(PreprocessConfig([path], out, str(tokenizer), **options))


def documents(prefix: Path) -> list[Document]:
    dataset = IndexedDataset(prefix)
    masks = [dataset.mask_of(i) for i in range(dataset.num_documents)]
    assert all(mask is not None for mask in masks)
    return [(dataset.document(i).tolist(), mask.tolist()) for i, mask in enumerate(masks) if mask is not None]


def pairs(rng: np.random.Generator, n: int) -> list[dict[str, str]]:
    words = ["the", "cat", "sat", "höchst", "🙂", "a\nb"]
    texts = [[" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(2)] for _ in range(n)]
    domains = rng.choice(["web", "wiki"], n)
    return [{"prompt": a, "response": b, "domain": str(d)} for (a, b), d in zip(texts, domains, strict=True)]


@pytest.fixture
def folder(bpe_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return folder(template, **settings) -> a tokenizer's folder with ChatML's special tokens and a chat template."""

    def make(template: str | None, **settings: object) -> Path:
        path = tmp_path / "tokenizer"
        path.mkdir(exist_ok=True)
        tokenizer = Tokenizer.from_file(str(bpe_file))
        tokenizer.add_special_tokens([AddedToken(f"<|im_{side}|>", normalized=False) for side in ("start", "end")])
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **settings}))
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return path

    return make


def test_pairs(write_jsonl: WriteJsonl, bpe_file: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Both texts are tokenized by themselves; the end is trained on; a record without a token is left out."""
    rows = [*pairs(rng, 30), {"prompt": "", "response": ""}, {"prompt": "the", "response": ""}]
    summary = preprocess_records(write_jsonl("a.jsonl", rows), tmp_path / "c", bpe_file)
    tokenizer = Tokenizer.from_file(str(bpe_file))
    expected = []
    for row in rows:
        prompt, response = (tokenizer.encode(row[key]).ids for key in ("prompt", "response"))
        if prompt or response:
            expected.append(([*prompt, *response, 0], [0] * len(prompt) + [1] * (len(response) + 1)))
    assert documents(tmp_path / "c_text_document") == expected
    assert summary.prefixes[0].skipped_documents == len(rows) - len(expected) > 0
    sidecar = read_sidecar(IndexedDataset(tmp_path / "c_text_document"))
    assert sidecar is not None
    assert (sidecar.mask, sidecar.documents) == (True, len(expected))


def test_no_merge_crosses_the_border(write_jsonl: WriteJsonl, bpe_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bpe_file))
    assert len(tokenizer.encode("that").ids) < len(tokenizer.encode("t").ids) + len(tokenizer.encode("hat").ids)
    preprocess_records(write_jsonl("a.jsonl", [{"prompt": "t", "response": "hat"}]), tmp_path / "c", bpe_file)
    ((tokens, mask),) = documents(tmp_path / "c_text_document")
    assert tokens == [*tokenizer.encode("t").ids, *tokenizer.encode("hat").ids, 0]
    assert mask == [0, *[1] * (len(tokens) - 1)]


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_keys_and_domains(write_jsonl: WriteJsonl, tmp_path: Path, append_eod: bool) -> None:
    rows = [{"q": "é", "a": "b", "task": "x"}, {"q": "", "a": "c", "task": "y"}, {"q": "d", "a": "\ne", "task": "x"}]
    keys = {"prompt_key": "q", "response_key": "a", "domain_key": "task", "append_eod": append_eod}
    preprocess_records(write_jsonl("a.jsonl", rows), tmp_path / "c", "bytes", **keys)
    end = [256] * append_eod
    assert documents(tmp_path / "c_x_text_document") == [
        ([195, 169, 98, *end], [0, 0, 1, *[1] * append_eod]),
        ([100, 10, 101, *end], [0, 1, 1, *[1] * append_eod]),
    ]
    assert documents(tmp_path / "c_y_text_document") == [([99, *end], [1, *[1] * append_eod])]


def test_a_start_is_not_trained_on_and_a_response_gets_no_space(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    """A tokenizer that begins texts with a space does not put one between prompt and response."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁the": 2, "cat": 3, "▁cat": 4, "\n": 5, "▁": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"prompt": "the", "response": "cat"}, {"prompt": "the", "response": " cat"}]
    preprocess_records(write_jsonl("a.jsonl", rows), tmp_path / "c", tmp_path / "tokenizer.json", bos=True)
    masks = [0, 0, 1, 1]
    assert documents(tmp_path / "c_text_document") == [([0, 2, 3, 1], masks), ([0, 2, 4, 1], masks)]


def test_chatml(write_jsonl: WriteJsonl, tmp_path: Path, folder: Callable[..., Path]) -> None:
    """The assistant's messages and what ends them are trained on; tokens are those of transformers."""
    from transformers import PreTrainedTokenizerFast

    path = folder(CHATML)
    rows = [{"messages": CHAT}, {"messages": CHAT[:4]}, {"prompt": "the", "response": "cat"}]
    preprocess_records(write_jsonl("a.jsonl", rows), tmp_path / "c", path)
    (complete, mask), (user_last, user_mask), pair = documents(tmp_path / "c_text_document")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path))
    for tokens, messages in ((complete, CHAT), (user_last, CHAT[:4])):
        assert tokens == [*theirs.apply_chat_template(messages, return_dict=False), 0]
    trained = theirs.decode([token for token, counts in zip(complete, mask, strict=True) if counts])
    assert trained == "is sat<|im_end|>\n the\n\ncat sat.<|im_end|>\n<|endoftext|>"
    assert (user_mask[-1], sum(user_mask)) == (0, mask.index(0, mask.index(1)) - mask.index(1))
    assert pair[1] == [0] * (len(pair[0]) - 1 - sum(pair[1][:-1])) + [1] * sum(pair[1])
    assert IndexedDataset(tmp_path / "c_text_document").num_documents == 3


def test_marks_of_the_template_are_those_of_transformers(
    write_jsonl: WriteJsonl, tmp_path: Path, folder: Callable[..., Path]
) -> None:
    """The template writes start and end itself: neither comes twice."""
    from transformers import PreTrainedTokenizerFast

    path = folder(MARKED, bos_token="<|im_start|>")
    preprocess_records(write_jsonl("a.jsonl", [{"messages": CHAT}]), tmp_path / "c", path, bos=True)
    ((tokens, mask),) = documents(tmp_path / "c_text_document")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path)).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]
    assert sum(mask) > 2
    assert (tokens[0], tokens[-1]) == (Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("<|im_start|>"), 0)


def test_an_end_outside_of_the_marks_is_trained_on(
    write_jsonl: WriteJsonl, tmp_path: Path, folder: Callable[..., Path]
) -> None:
    """White space behind the end is left out."""
    template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}\n\n{% endfor %}"
    )
    rows = [{"messages": [{"role": "assistant", "content": "cat"}]}]
    preprocess_records(write_jsonl("a.jsonl", rows), tmp_path / "c", folder(template))
    ((tokens, mask),) = documents(tmp_path / "c_text_document")
    assert tokens.count(0) == 1
    assert tokens[-1] == 0
    assert mask == [1] * len(tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no key 'response'; its keys are 'prompt'"),
        ({"prompt": "a", "response": 3}, "key 'response' is not a string but int"),
        ({"prompt": "a", "response": "\ud800"}, "not Unicode"),
        ({"messages": CHAT, "prompt": "a"}, "both keys 'messages' and 'prompt'"),
        ({"messages": {}}, "key 'messages' is not a list of messages"),
        ({"messages": []}, "key 'messages' is not a list of messages"),
        ({"messages": [{"role": "user"}]}, "key 'messages' holds no message: each needs a role and a content"),
        ({"messages": CHAT[:2]}, "a chat without an assistant's message"),
        (
            {"messages": [{"role": "user", "content": "a<|im_end|>"}, CHAT[2]]},
            r"a message spells a special token: <\|im_end\|>",
        ),
    ],
)
def test_what_is_no_record(
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    folder: Callable[..., Path],
    row: dict[str, Any],
    message: str,
) -> None:
    good = {"prompt": "the", "response": "cat"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {message}"):
        preprocess_records(path, tmp_path / "c", folder(CHATML))
    summary = preprocess_records(path, tmp_path / "c", folder(CHATML), skip_broken=True)
    assert (summary.prefixes[0].documents, sum(summary.broken.values())) == (1, 1)


def test_templates_that_do_not_serve(
    write_jsonl: WriteJsonl, bpe_file: Path, tmp_path: Path, folder: Callable[..., Path]
) -> None:
    path = write_jsonl("a.jsonl", [{"messages": CHAT}])
    for tokenizer in (folder(None), bpe_file, "bytes"):
        with pytest.raises(ValueError, match="the input has chats, but there is no chat template; give a folder"):
            preprocess_records(path, tmp_path / "c", tokenizer, skip_broken=True)
    last = "{% for m in messages %}{{ m['content'] if loop.last else m['role'] }}{% endfor %}"
    refusing = "{{ raise_exception('roles must alternate') }}"
    for template, message in (
        (last, "the assistant's message cannot be found in the chat: the template writes message 3 otherwise"),
        (refusing, "the chat template refuses the chat: roles must alternate"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl:1: {message}"):
            preprocess_records(path, tmp_path / "c", folder(template))
    with pytest.raises(ValueError, match="its chat template cannot be read"):
        preprocess_records(path, tmp_path / "c", folder("{{ broken"), skip_broken=True)


def test_other_inputs_and_keys_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.parquet").write_text("")
    common = ["--output-prefix", str(tmp_path / "c"), "--tokenizer", "bytes", "--sft"]
    for name in (str(tmp_path / "a.txt"), str(tmp_path / "a.parquet"), "hf:x"):
        assert main(["preprocess", "--input", name, *common]) == 2
        assert "--sft: reads JSON lines" in capsys.readouterr().err
    assert main(["preprocess", "--input", name, *common, "--prompt-key", "response"]) == 2
    assert "--prompt-key, --response-key and --messages-key must differ" in capsys.readouterr().err


@pytest.mark.parametrize("most_threads", [4, 0])
def test_workers_do_not_change_a_byte(
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    rng: np.random.Generator,
    folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    most_threads: int,
) -> None:
    """Threads share one template; processes read their own."""
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 400)
    monkeypatch.setattr(pool, "_MOST_THREADS", most_threads)
    rows = [{"messages": CHAT, "domain": "web"} if i % 3 else row for i, row in enumerate(pairs(rng, 40))]
    path, tokenizer = write_jsonl("a.jsonl", rows), folder(CHATML)
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        preprocess_records(path, tmp_path / str(workers) / "c", tokenizer, domain_key="domain", workers=workers)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("1", "2")]
    assert files[0] == files[1]
    assert len(files[0]) == 8


def test_a_run_that_stopped_goes_on(
    write_jsonl: WriteJsonl, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a broken line in the middle, after durable points; then by other keys."""
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 400)
    monkeypatch.setattr(preprocess, "_SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(preprocess, "_PAUSE", 0.0)
    rows = pairs(rng, 60)
    path = write_jsonl("a.jsonl", [*rows[:40], {"prompt": "a"}, *rows[40:]])
    with pytest.raises(ValueError, match=r"a\.jsonl:41: no key 'response'"):
        preprocess_records(path, tmp_path / "c", "bytes")
    assert (tmp_path / "c.partial" / "c_text_document.mask").stat().st_size > 56
    for other in ({"sft": False, "json_key": "prompt"}, {"response_key": "prompt", "prompt_key": "response"}):
        with pytest.raises(ValueError, match="holds an unfinished run with other --"):
            preprocess_records(path, tmp_path / "c", "bytes", **other)
    preprocess_records(path, tmp_path / "c", "bytes", skip_broken=True)
    preprocess_records(write_jsonl("b.jsonl", rows), tmp_path / "b", "bytes")
    for suffix in (".bin", ".idx", ".mask"):
        one, other_file = (tmp_path / f"{name}_text_document{suffix}" for name in "cb")
        assert one.read_bytes() == other_file.read_bytes()
    assert not (tmp_path / "c.partial").exists()


def test_plain_text_replaces_a_mask(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", [{"prompt": "a", "response": "b", "text": "ab"}])
    preprocess_records(path, tmp_path / "c", "bytes")
    preprocess_records(path, tmp_path / "c", "bytes", sft=False, overwrite=True)
    assert sorted(f.suffix for f in tmp_path.glob("c_*")) == [".bin", ".idx", ".meta"]
    assert IndexedDataset(tmp_path / "c_text_document").mask is None

"""transformers generates from an export as from the original, as public models of the families are configured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_lfr.cli import main
from support.families import make_model

END, TURN, START, PAD = "<|end|>", "<|turn|>", "<|start|>", "<|pad|>"


@dataclass(frozen=True)
class Case:
    """Which special tokens the files of a model name: as names, which stand for ids in the last two files."""

    model: str
    tokenizer: dict[str, str | None]
    config: dict[str, Any]
    generation: dict[str, Any] | None
    names_in_map: dict[str, str] = field(default_factory=dict)
    """Content of special_tokens_map.json."""


_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
CASES = {
    "gpt2": Case(
        "gpt2",
        {"bos_token": END, "eos_token": END, "unk_token": END},
        {"bos_token_id": END, "eos_token_id": END},
        None,
    ),
    "llama, base": Case(
        "llama, llama3",
        {"bos_token": START, "eos_token": END},
        {"bos_token_id": START, "eos_token_id": END},
        {"bos_token_id": START, "eos_token_id": END},
    ),
    "llama, chat": Case(
        "llama, llama3",
        {"bos_token": START, "eos_token": TURN},
        {"bos_token_id": START, "eos_token_id": [END, TURN]},
        {"bos_token_id": START, "eos_token_id": [END, TURN], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "llama, chat without generation_config.json": Case(
        "llama, llama3",
        {"bos_token": START, "eos_token": TURN},
        {"bos_token_id": START, "eos_token_id": [END, TURN], "pad_token_id": PAD, "repetition_penalty": 1.5},
        None,
    ),
    "mistral": Case(
        "mistral, window",
        {"bos_token": START, "eos_token": END},
        {"bos_token_id": START, "eos_token_id": END},
        {"bos_token_id": START, "eos_token_id": END},
        {"pad_token": PAD, "bos_token": START, "eos_token": END},
    ),
    "qwen2, base": Case(
        "qwen2",
        {"bos_token": None, "eos_token": END, "pad_token": END},
        {"bos_token_id": END, "eos_token_id": END},
        {"bos_token_id": END, "eos_token_id": END, "do_sample": False, "max_new_tokens": 2048},
    ),
    "qwen3, chat": Case(
        "qwen3",
        {"bos_token": None, "eos_token": TURN, "pad_token": END},
        {"bos_token_id": END, "eos_token_id": TURN},
        {"bos_token_id": END, "eos_token_id": [TURN, END], "pad_token_id": END, **_SAMPLING},
    ),
    "olmo2": Case(
        "olmo2",
        {"bos_token": None, "eos_token": END, "pad_token": PAD},
        {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD},
        {"eos_token_id": END, "pad_token_id": PAD},
    ),
}
PROMPTS = torch.tensor([[5, 17, 40], [99, 6, 77]])
LENGTH = 24


def generate(model: PreTrainedModel, prompts: Tensor | None = PROMPTS, **options: Any) -> list[list[int]]:
    torch.manual_seed(5)
    mask = None if prompts is None else torch.ones_like(prompts)
    rows: list[list[int]] = model.generate(prompts, attention_mask=mask, max_new_tokens=LENGTH, **options).tolist()
    return rows


def last_new(row: list[int], besides: int | None = None) -> int | None:
    """Return the token whose first place in what was generated is the latest; None if there is none."""
    return next((token for token in reversed(dict.fromkeys(row[PROMPTS.shape[1] :])) if token != besides), None)


def write_original(folder: Path, case: Case) -> None:
    """Write a model whose tokens of an end are some that it generates, so that what ends a generation shows."""
    model = make_model(case.model)
    settings = {**case.config, **(case.generation or {})}
    sampling = {key: value for key, value in settings.items() if not key.endswith("_id") and key != "max_new_tokens"}
    rows = generate(model, pad_token_id=0, **sampling)
    end = last_new(rows[1])
    assert end is not None
    ids = {END: end}
    if (turn := last_new(rows[0], end)) is not None:
        ids[TURN] = turn
    free = (number for number in range(1, 50) if number not in ids.values())
    ids |= {name: next(free) for name in (TURN, START, PAD) if name not in ids}
    names = {number: name for name, number in ids.items()}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(120)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ids])

    def with_ids(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: [ids[one] for one in value] if isinstance(value, list) else ids.get(value, value)
            for key, value in values.items()
        }

    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any] | None] = {
        "config.json": {**config, **with_ids(case.config)},
        "generation_config.json": None if case.generation is None else with_ids(case.generation),
        "tokenizer_config.json": {**case.tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": case.names_in_map or None,
    }
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", CASES)
def test_an_export_generates_what_the_original_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "hf").mkdir()
    write_original(tmp_path / "hf", case)
    assert main(["convert", "from-hf", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 0
    assert main(["convert", "to-hf", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "back")]) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval() for folder in ("hf", "back")]
    original, export = (generate(model) for model in models)
    assert export == original
    ends, starts = ([getattr(m.generation_config, f"{role}_token_id") for m in models] for role in ("eos", "bos"))
    assert ends[0] == ends[1]
    met = [ends[0]] if isinstance(ends[0], int) else ends[0]
    assert any(end in row[PROMPTS.shape[1] :] for row in original for end in met)
    assert starts[0] == starts[1]
    if starts[0] is not None:  # without a prompt, a generation begins with it
        assert generate(models[0], None) == generate(models[1], None)
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("hf", "back"))
    assert theirs.special_tokens_map == ours.special_tokens_map
    text = ["w7 w8 w9", "w7"]
    if theirs.pad_token is not None:
        assert theirs(text, padding=True)["input_ids"] == ours(text, padding=True)["input_ids"]

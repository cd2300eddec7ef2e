"""A run goes the ways of a block id and of a step that docs/architecture.md lists."""

from __future__ import annotations

import importlib
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

from megatron_lfr.cli import main
from megatron_lfr.model import Decoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def listed(heading: str) -> list[tuple[str, str]]:
    """Return the (file, function) of each line of a section's list."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    functions = re.findall(r"^\d+\. `([\w/]+\.py)::([\w.]+)`", section, re.MULTILINE)
    assert len(functions) > 5
    return functions


def test_a_step_passes_the_listed_functions_and_no_others(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = []
    forward = Decoder.forward

    def noting(model: Decoder, *arguments: Any, **options: Any) -> Any:
        codes = [frame.f_code for frame, _ in traceback.walk_stack(None)][1:]
        ours = [code for code in reversed(codes) if Path(code.co_filename).is_relative_to(ROOT / "megatron_lfr")]
        stacks.append([(str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname) for code in ours])
        return forward(model, *arguments, **options)

    monkeypatch.setattr(Decoder, "forward", noting)
    assert main(["train", *tiny_args, "--train-epochs", "0.5"]) == 0
    *calls, model = listed("The way of a step")
    assert stacks[0] == calls
    assert model == ("megatron_lfr/model/decoder.py", "Decoder.forward")


def test_a_block_id_passes_the_listed_functions_in_turn(tiny_args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[tuple[str, str]] = []
    way = listed("The way of a block id")

    def noted(step: tuple[str, str], function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if step not in passed:
                passed.append(step)
            return function(*arguments, **options)

        return call

    for path, name in way:
        owner, method = name.split(".")
        cls = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), owner)
        monkeypatch.setattr(cls, method, noted((path, name), getattr(cls, method)))
    assert main(["train", *tiny_args, "--train-epochs", "0.5"]) == 0
    assert passed == way

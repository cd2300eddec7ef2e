"""Chats as text, by the template of a Hugging Face tokenizer folder, and which parts of it the assistant wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_lfr.data.corpus.tokenizer import FileTokenizer, Tokenizer
from megatron_lfr.data.preprocess.documents import BrokenDocument

Message = dict[str, Any]
Span = tuple[int, int]
"""First character, and the one after the last."""

ASSISTANT = "assistant"
"""The role whose messages are trained on, as in transformers."""

_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""In a tokenizer's folder, what decides how a chat is written."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_digest(tokenizer: Tokenizer) -> str | None:
    """Return a hash of the files that decide how a tokenizer's chats are written; None where it has no folder."""
    folder = _folder_of(tokenizer)
    if folder is None:
        return None
    files = [folder / name for name in _FILES]
    return hashlib.sha256(b"\0".join(path.read_bytes() if path.is_file() else b"" for path in files)).hexdigest()


class ChatTemplate:
    """The chat template of a tokenizer's folder, which is only read when the first chat is rendered. eod: the id that
    ends documents, if any does."""

    def __init__(self, tokenizer: Tokenizer, eod: int | None) -> None:
        self._tokenizer = tokenizer
        self._end = None if eod is None else tokenizer.token(eod)
        self._lock = threading.Lock()  # transformers' renderer notes the assistant's parts in one place

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return a chat as text, without white space behind an end-of-document token at its end, and the spans that are
        trained on, in order: what the template marks by {% generation %}; where it marks nothing, each message of the
        assistant, with what ends it.

        BrokenDocument for a chat that the template refuses, in which the assistant says nothing, or whose messages
        spell a special token. ValueError where there is no template, or it cannot be read.
        """
        with self._lock:
            has_marks = self._marks
            self._check_content(messages)
            text, spans = self._render(messages)
            if not has_marks:
                spans = [self._span(messages, number, text) for number in _of_assistant(messages)]
        if not any(first < last for first, last in spans):
            raise BrokenDocument("a chat without an assistant's message")
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            raise BrokenDocument("the chat template marks the assistant's messages in another order")
        stripped = text.rstrip()
        if self._end is not None and stripped.endswith(self._end):
            text = stripped
        return text, [(min(first, len(text)), min(last, len(text))) for first, last in spans]

    def _span(self, messages: Sequence[Message], number: int, text: str) -> Span:
        """Find one message of the assistant by what the text of the chat is before and after it."""
        before, _ = self._render(messages[:number], add_generation_prompt=True) if number else ("", [])
        after, _ = self._render(messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise BrokenDocument(
                "the assistant's message cannot be found in the chat",
                f": the template writes message {number + 1} otherwise than where the chat ends with it; templates "
                "that mark it by {% generation %} need no search",
            )
        return len(before), len(after)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        from jinja2 import TemplateSyntaxError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        template, names = self._template
        try:
            texts, spans = render(
                conversations=[list(messages)],
                chat_template=template,
                return_assistant_tokens_mask=self._marks,
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except ImportError as error:  # without jinja2
            raise ValueError(f"--sft: {error}") from None
        except TemplateSyntaxError as error:
            raise ValueError(f"--tokenizer {self._tokenizer.name}: its chat template cannot be read: {error}") from None
        except Exception as error:  # a template may raise whatever it likes
            raise BrokenDocument("the chat template refuses the chat", f": {error}") from None
        return texts[0], spans[0] if self._marks else []

    @cached_property
    def _marks(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return _GENERATION.search(self._template[0]) is not None

    @cached_property
    def _template(self) -> tuple[str, dict[str, str]]:
        """The template, and the special tokens that it may name."""
        folder = _folder_of(self._tokenizer)
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("--sft: chats need the package transformers; pip install 'megatron_lfr[hf]'")
        if folder is None or not any((folder / name).is_file() for name in _FILES):
            raise ValueError(self._no_template)
        from transformers import PreTrainedTokenizerFast

        try:
            theirs = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever is wrong with the folder
            raise ValueError(f"--tokenizer {folder}: transformers does not read it: {error}") from None
        if theirs.chat_template is None:
            raise ValueError(self._no_template)
        try:
            return theirs.get_chat_template(), theirs.special_tokens_map
        except ValueError as error:  # several templates, and none is the default
            raise ValueError(f"--tokenizer {folder}: {error}") from None

    @property
    def _no_template(self) -> str:
        return (
            f"--tokenizer {self._tokenizer.name}: the input has chats, but there is no chat template; give a folder "
            "that holds one in chat_template.jinja or tokenizer_config.json, beside tokenizer.json"
        )

    def _check_content(self, messages: Sequence[Message]) -> None:
        assert isinstance(self._tokenizer, FileTokenizer)
        for message in messages:
            for name in self._tokenizer.special_tokens:
                if name in message["content"]:
                    raise BrokenDocument("a message spells a special token", f": {name}")


def _of_assistant(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]


def _folder_of(tokenizer: Tokenizer) -> Path | None:
    return tokenizer.path.parent if isinstance(tokenizer, FileTokenizer) and tokenizer.has_neighbours else None

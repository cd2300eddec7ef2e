"""The sidecar of a prefix, `<prefix>.meta` beside its .bin and .idx: it says how the token ids were made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.data.corpus.indexed import META, IndexedDataset, with_suffix
from megatron_lfr.data.corpus.mask import MASK
from megatron_lfr.output import visible

FORMAT, MASKED_FORMAT = 1, 2
"""That of a corpus with a loss mask differs: a version that does not know masks would train on all tokens."""
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """What cannot be seen in the ids of a corpus. A JSON file; corpora made by other programs have none."""

    tokenizer: str
    """The value of --tokenizer."""
    fingerprint: str
    """`Tokenizer.fingerprint`."""
    vocab_size: int
    eod: int | None
    """The id that ends every document; None where none does."""
    bos: int | None
    """The id that starts every document; None where none does."""
    output_prefix: str
    """The last part of --output-prefix, which the domains of a corpus share."""
    documents: int
    tokens: int
    mask: bool = False
    """Whether a loss mask (mask.py) belongs to the corpus."""

    @property
    def made_by(self) -> str:
        """Name the tokenizer in messages: by its name, and the beginning of its fingerprint."""
        return tokenizer_name(self.tokenizer, self.fingerprint)

    def to_json(self) -> str:
        """Return the content of the file."""
        content = {"format": MASKED_FORMAT if self.mask else FORMAT, **dataclasses.asdict(self)}
        if not self.mask:
            del content["mask"]
        return json.dumps(content, indent=1) + "\n"


def tokenizer_name(name: str, fingerprint: str) -> str:
    """Name a tokenizer in messages: by its name, and the beginning of its fingerprint."""
    return visible(name if name == fingerprint else f"{name} ({fingerprint[:15]})")


def read_sidecar(dataset: IndexedDataset) -> Sidecar | None:
    """Read the sidecar of an indexed dataset; None where it has none.

    ValueError for a file that is damaged, of a newer version, or of another dataset than the one beside it, and where
    there is a loss mask and it says that there is none, or the reverse.
    """
    path = with_suffix(dataset.prefix, META)
    if not os.path.lexists(path):
        return None
    sidecar = _parse(path)
    if (sidecar.documents, sidecar.tokens) != (dataset.num_documents, dataset.num_tokens):
        raise ValueError(
            f"{path}: is of another corpus: it counts {sidecar.documents} documents and {sidecar.tokens} tokens, the "
            f".idx {dataset.num_documents} and {dataset.num_tokens}; remove it where the .idx is right"
        )
    if sidecar.mask and dataset.mask is None:
        raise ValueError(
            f"{with_suffix(dataset.prefix, MASK)}: no such file, but {path.name} says that the corpus has a loss mask; "
            "restore it, or preprocess again"
        )
    if dataset.mask is not None and not sidecar.mask:
        raise ValueError(f"{dataset.mask.path}: {path.name} says that the corpus has no loss mask; remove one of both")
    return sidecar


def common_sidecar(datasets: Iterable[IndexedDataset], flag: str) -> tuple[Sidecar | None, bool]:
    """Return (the first sidecar of several datasets, whether all of them have one), having checked that they agree.

    ValueError names two that were made by different tokenizers, or end or start their documents with different ids.
    """
    first: tuple[Path, Sidecar] | None = None
    everywhere = True
    for dataset in datasets:
        sidecar = read_sidecar(dataset)
        if sidecar is None:
            everywhere = False
            continue
        first = first or (dataset.prefix, sidecar)
        first_prefix, expected = first
        if sidecar.fingerprint != expected.fingerprint:
            raise ValueError(
                f"{flag} {dataset.prefix}: was made with the tokenizer {sidecar.made_by}, {first_prefix} "
                f"with {expected.made_by}; their ids mean different tokens"
            )
        for field, verb in (("eod", "end"), ("bos", "start")):
            number, other = getattr(sidecar, field), getattr(expected, field)
            if number != other:
                raise ValueError(
                    f"{flag} {dataset.prefix}: its documents {verb} with {_id(number)}, those of {first_prefix} "
                    f"{verb} with {_id(other)}"
                )
    return (first and first[1]), everywhere


def _id(number: int | None) -> str:
    return "no token of their own" if number is None else f"id {number}"


def output_prefix_of(prefix: Path) -> str | None:
    """Return the last part of the --output-prefix under which a prefix was made; None where no sidecar says so."""
    try:
        return _parse(with_suffix(prefix, META)).output_prefix
    except (OSError, ValueError):
        return None


def _parse(path: Path) -> Sidecar:
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path}: damaged: too large")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: not JSON: {error}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path}: damaged: no object with a format")
    if content["format"] not in (FORMAT, MASKED_FORMAT):
        legal_formats = f"{FORMAT} and {MASKED_FORMAT}"
        raise ValueError(f"{path}: is of format {content['format']!r:.40}; this version reads {legal_formats}")
    legal: dict[str, tuple[type, ...]] = {"eod": (int, type(None)), "bos": (int, type(None))}
    legal |= dict.fromkeys(("tokenizer", "fingerprint", "output_prefix"), (str,))
    legal |= dict.fromkeys(("vocab_size", "documents", "tokens"), (int,))
    if content["format"] == MASKED_FORMAT:
        legal["mask"] = (bool,)
    for key, types in legal.items():
        if key not in content or type(content[key]) not in types:
            raise ValueError(f"{path}: damaged: {key} is {content.get(key)!r:.40}")
    sidecar = Sidecar(**{key: content[key] for key in legal})
    for number in (sidecar.eod, sidecar.bos):
        if number is not None and not 0 <= number < sidecar.vocab_size:
            raise ValueError(f"{path}: damaged: a vocabulary of {sidecar.vocab_size} tokens has no id {number}")
    return sidecar

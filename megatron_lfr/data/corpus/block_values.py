"""Files with a number for each training block of a corpus, NAME=FILE.npy, and what says of which corpus they are.

FILE.npy holds fp32 or uint32 [blocks], in the order of the block ids; FILE.npy.json beside it, its description, has the
digests of the corpus, which cover the split and the sequence length, and the SHA-256 of the numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.fileio import json_value, map_array, write_atomic
from megatron_lfr.output import is_number, visible

KIND = "megatron-lfr numbers of blocks"
FORMAT = 1
DESCRIPTION_BEGINS = f'{{\n "kind": "{KIND}"'.encode()
"""The beginning of a description; a file that begins so may be replaced."""
_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.+)")
_CHUNK = 1 << 22
_LARGEST = 1 << 24  # bytes of a description, which has a line for each prefix


@dataclass(frozen=True)
class BlockValues:
    """The numbers in a file, mapped into memory. description: None where there is none beside it."""

    name: str
    path: Path
    values: npt.NDArray[np.number]
    sha256: str
    description: dict[str, Any] | None

    def flops(self, flag: str) -> float:
        """Return the FLOPs that the numbers took, by their description: a number, or several by what they were for, as
        `evaluate --per-block` writes; 0 where that does not say. ValueError begins with `flag`."""
        flops = (self.description or {}).get("flops", 0)
        parts = flops if isinstance(flops, dict) else {"flops": flops}
        for what, part in parts.items():
            if not is_number(part) or part < 0:
                raise ValueError(
                    f"{flag} {self.name}={self.path}: its description says {what}: {json.dumps(part)}; write there how "
                    "many FLOPs that took, a number of at least 0"
                )
        return sum(map(float, parts.values()))

    def check_groups(self, flag: str) -> None:
        """Check that the numbers can say which blocks belong together; ValueError begins with `flag`."""
        what = (self.description or {}).get("what")
        if what in ("commonness: copies", "commonness: near_copies"):
            raise ValueError(
                f"{flag} {self.name}={self.path}: holds how many copies each block has, not which blocks are copies of "
                "each other; that is block_representative.npy beside it"
            )

    def check_corpus(self, corpus: Sequence[str], flag: str) -> None:
        """Check that the numbers are of a corpus with these digests; ValueError begins with `flag`. Without a
        description there is nothing to check."""
        if self.description is None:
            return
        if (split := self.description.get("split", "train")) not in ("train", "all"):
            raise ValueError(
                f"{flag} {self.name}={self.path}: was made of the split {split}, not of the training blocks"
            )
        theirs = self.description["corpus"]
        if len(theirs) != len(corpus):
            raise ValueError(
                f"{flag} {self.name}={self.path}: was made of {len(theirs)} prefixes, the corpus has {len(corpus)}"
            )
        for number, (one, other) in enumerate(zip(theirs, corpus, strict=True), 1):
            if one != other:
                raise ValueError(
                    f"{flag} {self.name}={self.path}: was made of another corpus, --split or --seq-length: prefix "
                    f"{number} of {len(corpus)} differs"
                )


def parse_names(words: Iterable[str], flag: str) -> dict[str, Path]:
    """Parse NAME=FILE.npy, of which the last of a name counts; ValueError names `flag`."""
    files = {}
    for word in words:
        match = _NAME.fullmatch(word)
        if match is None:
            raise ValueError(f"{flag} {word}: expected NAME=FILE.npy, the name of letters, digits, _ . and -")
        files[match[1]] = Path(match[2])
    return files


def numbers(arrays: Sequence[Mapping[str, BlockValues]]) -> list[dict[str, npt.NDArray[np.number]]]:
    """Return the numbers of the files of each segment."""
    return [{name: named.values for name, named in files.items()} for files in arrays]


def digests_of(arrays: Sequence[Mapping[str, BlockValues]]) -> list[dict[str, str]]:
    """Return the SHA-256 of the files of each segment."""
    return [{name: named.sha256 for name, named in files.items()} for files in arrays]


def open_values(name: str, path: Path, flag: str) -> BlockValues:
    """Map a file of numbers, read once for its hash; nothing is unpickled. ValueError begins with `flag`, OSError names
    the file."""
    try:
        with path.open("rb") as file:  # `map_array` says less about a file that is not there
            is_npy = file.read(6) == b"\x93NUMPY"
        if not is_npy:
            raise ValueError("is no .npy file")
        try:
            values = map_array(path)
        except ValueError as error:
            raise ValueError(
                f"cannot be mapped ({error}): it is cut short, damaged or of objects; make it again"
            ) from None
        if values.ndim != 1 or values.dtype.newbyteorder("=") not in (np.dtype("f4"), np.dtype("u4")):
            raise ValueError(f"holds {values.dtype} {list(values.shape)}, must hold float32 or uint32 [blocks]")
        sha256 = hash_values(values)
        description = _read_description(path)
        if description is not None and description["sha256"] != sha256:
            raise ValueError(f"is not the file that {describing(path).name} beside it describes")
    except ValueError as error:
        raise ValueError(f"{flag} {name}={path}: {error}") from None
    return BlockValues(name, path, values, sha256, description)


def hash_values(values: npt.NDArray[np.number]) -> str:
    """Return the SHA-256 (hex) of the numbers, without the header of a file."""
    digest = hashlib.sha256(f"{values.dtype.str} {len(values)}\n".encode())
    for first in range(0, len(values), _CHUNK):
        digest.update(np.ascontiguousarray(values[first : first + _CHUNK]).data)
    return digest.hexdigest()


def describing(path: Path) -> Path:
    """Return the description's name, beside the file it describes."""
    return path.with_name(f"{path.name}.json")


def description_of(values: npt.NDArray[np.number], corpus: Sequence[str], what: str, **more: Any) -> str:
    """Return the content of the description of numbers of a corpus with these digests. what: what they are, for people;
    more: JSON values that go in as they are."""
    content = {"kind": KIND, "format": FORMAT, "what": what, "blocks": len(values), "sha256": hash_values(values)}
    return json.dumps(json_value({**content, "corpus": list(corpus), **more}), indent=1) + "\n"


def write_description(path: Path, corpus: Sequence[str], what: str, **more: Any) -> None:
    """Describe the numbers in the finished file `path`, as `description_of`."""
    write_atomic(describing(path), description_of(np.load(path, mmap_mode="r"), corpus, what, **more))


def _read_description(path: Path) -> dict[str, Any] | None:
    source = describing(path)
    try:
        with source.open("rb") as file:
            content = json.loads(file.read(_LARGEST))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.name} beside it is not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{source.name} beside it describes something else; remove it, or rename the file")
    if content.get("format") != FORMAT:
        version = visible(repr(content.get("format")))
        raise ValueError(
            f"{source.name} beside it has the format {version}; this version of megatron_lfr reads {FORMAT}"
        )
    corpus = content.get("corpus")
    if not isinstance(corpus, list) or not all(isinstance(digest, str) for digest in corpus):
        raise ValueError(f"{source.name} beside it: corpus: expected a digest for each prefix")
    return {**content, "sha256": content.get("sha256")}

"""Build the corpora of the studies: clean text, the same text among copies and junk, held-out and trusted text.

    python studies/make_corpora.py OUT [--text FILE.jsonl] [--megabytes N] [--apart SHARE]

From nothing but the running Python's standard library (examples/demo/make_corpus.py: code, docstrings, language
reference, sentences on characters), as large as that allows: about 7 MB. --text takes {"domain", "text"} lines instead.
The same text and seed give the same files. OUT gets, as JSONL:

    held_out    5 % (--apart) of the documents of each domain
    trusted     as many, disjoint from all others: what a trusted reference model is trained on
    clean       the rest
    redundant   clean (60 % of the bytes); copies (28 %, --copies); junk (12 %, --junk); spread over the domains
    redundant.labels    what was planted: a name for each document, those of the first domain first, in order of names

Copies: documents of clean in numbers that follow Zipf's law (the r-th most copied document has 1/r as many as the
first), half of them with 2 % of the words replaced, and boilerplate (a seventh of the copies), which is the same text
but for names and years. Junk: half of it documents whose words are shuffled; half base64, hexadecimal and digits
(--junk-kind: one of the two). --seed makes other corpora of the same text.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_lfr.fileio import write_atomic

SEED = 2026
COPIES, JUNK = 0.28, 0.12
JUNK_KINDS = ("shuffled", "coded")
BOILERPLATE = 1 / 7
EDITED_WORDS = 0.02
KINDS = ("unique", "copy", "edited copy", "boilerplate", "shuffled", "coded")
WORD = re.compile(r"\S+")

Document = tuple[str, str, str]
"""Domain, kind and text."""

BOILERPLATES = (
    "This website uses cookies. By continuing to browse the site, {name}, you agree to our use of cookies and "
    "accept our privacy policy as amended in {year}. You can change your settings at any time. Accept all. "
    "Reject all. Read more about how {name} and its {count} partners store and process your data. Terms of "
    "service. Contact. Imprint. Careers.",
    "Copyright (c) {year} {name}. All rights reserved. Redistribution and use in source and binary forms, with"
    " or without modification, are permitted provided that the following conditions are met: redistributions "
    "of source code must retain the above copyright notice, this list of conditions and the following "
    "disclaimer. This software is provided by {name} as is, and any express or implied warranties are "
    "disclaimed. In no event shall {name} be liable.",
    "Home. About us. Products. Support. Blog. Log in. Sign up for free. Share this page. {count} comments. "
    "Leave a reply. Your email address will not be published. Required fields are marked. Related posts. "
    "Previous article. Next article. Subscribe to our newsletter. Follow {name} on social media. Powered by "
    "{name}. Archives: {year}. Back to top.",
)


def library_text() -> dict[str, list[str]]:
    """Return the documents of the demo's domains, as many as the standard library has."""
    path = Path(__file__).parents[1] / "examples" / "demo" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    code, docstrings = demo.code_and_docstrings(10**9)
    texts = {
        "code": code,
        "docstrings": docstrings,
        "reference": demo.reference(),
        "unicode": demo.unicode_facts(10**9),
    }
    return {domain: sorted(set(documents)) for domain, documents in texts.items()}


def read_text(path: Path) -> dict[str, list[str]]:
    """Read documents by domain from JSONL."""
    texts: dict[str, set[str]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                domain, text = row["domain"], row["text"]
                if not isinstance(domain, str) or not isinstance(text, str):
                    raise TypeError("domain and text are texts")
                if WORD.search(text):  # a document of no word is none of the indexed dataset
                    texts.setdefault(domain, set()).add(text)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--text {path}:{number}: expected domain and text ({error!r})") from None
    if not texts:
        raise ValueError(f"--text {path}: holds no document")
    return {domain: sorted(texts[domain]) for domain in sorted(texts, key=file_of)}


def take(texts: dict[str, list[str]], n_bytes: float, seed: int = SEED) -> dict[str, list[str]]:
    """Shuffle each domain's documents, and take `n_bytes` in all, the same share of each domain."""
    total = sum(size(text) for documents in texts.values() for text in documents)
    taken = {}
    for domain, documents in texts.items():
        shuffled = list(documents)
        random.Random(f"{seed} {domain}").shuffle(shuffled)
        budget = sum(map(size, shuffled)) * min(1.0, n_bytes / total)
        taken[domain] = list(until(budget, iter(shuffled)))
    return taken


def until(n_bytes: float, texts: Iterator[str]) -> Iterator[str]:
    """Yield texts until they have so many bytes together."""
    filled = 0
    for text in texts:
        if filled >= n_bytes:
            return
        filled += size(text)
        yield text


def size(text: str) -> int:
    return len(text.encode())


def copies(clean: list[Document], n_bytes: float, choose: random.Random) -> Iterator[Document]:
    """Yield copies of documents of `clean`, every other one edited, in numbers after Zipf's law."""
    order = list(clean)
    choose.shuffle(order)
    words = sorted({word for _, _, text in order[:500] for word in WORD.findall(text)})
    most = zipf_top(order, n_bytes)
    filled = number = 0
    for rank, (domain, _, text) in enumerate(order, 1):
        for _ in range(max(1, round(most / rank))):
            if filled >= n_bytes:
                return
            filled += size(text)
            number += 1
            yield (domain, "edited copy", edited(text, words, choose)) if number % 2 else (domain, "copy", text)


def zipf_top(order: list[Document], n_bytes: float) -> int:
    """Return how often the most copied document is copied, so that a fifth of all documents have copies."""
    last = max(1, len(order) // 5)
    per_unit = sum(size(text) / rank for rank, (_, _, text) in enumerate(order[:last], 1))
    return max(1, round(n_bytes / per_unit))


def edited(text: str, words: list[str], choose: random.Random) -> str:
    """Replace 2 % of the words, at least one, by others."""
    spans = list(WORD.finditer(text))
    chosen = sorted(choose.sample(range(len(spans)), max(1, round(EDITED_WORDS * len(spans)))), reverse=True)
    for index in chosen:
        text = text[: spans[index].start()] + choose.choice(words) + text[spans[index].end() :]
    return text


def boilerplate(domains: list[str], n_bytes: float, choose: random.Random) -> Iterator[Document]:
    """Yield boilerplate with other names and years."""
    names = ("Northwind", "Acme", "Contoso", "Initech", "Umbrella", "Globex", "Hooli", "Stark", "Wayne", "Tyrell")
    texts = (
        choose.choice(BOILERPLATES).format(
            name=choose.choice(names), year=choose.randint(1995, 2026), count=choose.randint(2, 900)
        )
        for _ in iter(int, 1)
    )
    for text in until(n_bytes, texts):
        yield choose.choice(domains), "boilerplate", text


def shuffled(clean: list[Document], n_bytes: float, choose: random.Random) -> Iterator[Document]:
    """Yield documents whose words are in no order."""
    filled = 0
    while filled < n_bytes:
        domain, _, text = choose.choice(clean)
        words = WORD.findall(text)
        choose.shuffle(words)
        mixed = " ".join(words)
        filled += size(mixed)
        yield domain, "shuffled", mixed


def coded(domains: list[str], n_bytes: float, choose: random.Random) -> Iterator[Document]:
    """Yield random bytes as base64, hexadecimal and digits, in turn."""
    encoders: tuple[Callable[[bytes], str], ...] = (
        lambda raw: base64.b64encode(raw).decode(),
        lambda raw: raw.hex(),
        lambda raw: "".join(str(byte % 10) for byte in raw),
    )
    filled = number = 0
    while filled < n_bytes:
        text = encoders[number % 3](choose.randbytes(choose.randint(600, 3500)))
        filled += size(text)
        number += 1
        yield choose.choice(domains), "coded", text


def redundant(
    clean: list[Document],
    copied: float = COPIES,
    junk: float = JUNK,
    junk_kinds: Sequence[str] = JUNK_KINDS,
    seed: int = SEED,
) -> list[Document]:
    """Return the clean documents among copies and junk, in a random order. copied, junk: their shares of the bytes."""
    choose = random.Random(seed)
    domains = sorted({domain for domain, _, _ in clean})
    total = sum(size(text) for _, _, text in clean) / (1 - copied - junk)
    by_kind = {kind: junk * total / len(junk_kinds) for kind in junk_kinds}
    documents = [
        *clean,
        *copies(clean, (1 - BOILERPLATE) * copied * total, choose),
        *boilerplate(domains, BOILERPLATE * copied * total, choose),
        *shuffled(clean, by_kind.get("shuffled", 0), choose),
        *coded(domains, by_kind.get("coded", 0), choose),
    ]
    choose.shuffle(documents)
    return sorted(documents, key=lambda document: file_of(document[0]))  # as the labels are; stable


def file_of(domain: str) -> str:
    """Return the end of the name of a domain's indexed dataset: its prefixes are read in the order of their files."""
    return f"{domain}_text_document.idx"


def apart(texts: dict[str, list[str]], share: float) -> dict[str, list[Document]]:
    """Divide the documents of each domain into held_out, trusted (both `share` of them) and clean."""
    parts: dict[str, list[Document]] = {"held_out": [], "trusted": [], "clean": []}
    for domain, documents in texts.items():
        first, second = round(share * len(documents)), round(2 * share * len(documents))
        for name, chosen in zip(parts, (documents[:first], documents[first:second], documents[second:]), strict=True):
            parts[name] += [(domain, "unique", text) for text in chosen]
    return parts


def write_documents(path: Path, documents: list[Document]) -> None:
    """Write documents as JSONL with domain and text."""
    lines = [json.dumps({"domain": domain, "text": text}, ensure_ascii=False) for domain, _, text in documents]
    write_atomic(path, "\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write to")
    parser.add_argument("--text", type=Path, help="JSONL with domain and text, in the place of the standard library")
    parser.add_argument("--megabytes", type=float, help="size of the clean, held-out and trusted text together")
    parser.add_argument(
        "--apart", type=float, default=0.05, help="share of the documents that is held out, and that is trusted"
    )
    parser.add_argument("--copies", type=float, default=COPIES, help="share of copies in the redundant corpus")
    parser.add_argument("--junk", type=float, default=JUNK, help="share of junk in it")
    parser.add_argument("--junk-kind", choices=JUNK_KINDS, help="one kind of junk alone")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    if args.megabytes is not None and not args.megabytes > 0:
        parser.error("--megabytes: must be positive")
    if not 0 < args.apart < 0.5:
        parser.error("--apart: must be above 0 and below 0.5")
    if not (args.copies >= 0 and args.junk >= 0 and args.copies + args.junk < 1):
        parser.error("--copies, --junk: must be 0 or more, and below 1 together")
    texts = take(read_text(args.text) if args.text else library_text(), 1e6 * (args.megabytes or 1e9), args.seed)
    parts = apart(texts, args.apart)
    kinds = JUNK_KINDS if args.junk_kind is None else (args.junk_kind,)
    parts["redundant"] = redundant(parts["clean"], args.copies, args.junk, kinds, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        write_documents(args.output / f"{name}.jsonl", documents)
    write_atomic(args.output / "redundant.labels", "".join(f"{kind}\n" for _, kind, _ in parts["redundant"]))
    print_sizes(parts)
    return 0


def print_sizes(parts: dict[str, list[Document]]) -> None:
    """Print documents, size and what each corpus holds."""
    for name, documents in parts.items():
        total = sum(size(text) for _, _, text in documents)
        shares = {kind: sum(size(t) for _, k, t in documents if k == kind) / total for kind in KINDS}
        planted = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items() if share)
        print(f"{name:<10}{len(documents):>7} documents{total / 1e6:>8.2f} MB  {planted}")


if __name__ == "__main__":
    sys.exit(main())

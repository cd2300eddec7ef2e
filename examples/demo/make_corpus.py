"""Build a corpus of four domains from nothing but the running Python's standard library.

    python examples/demo/make_corpus.py corpus.jsonl

code: module sources without docstrings; docstrings: what was taken out of them; reference: the language reference that
help() shows; unicode: sentences about characters. One JSON object a line: {"domain": ..., "text": ...}. The same Python
gives the same file.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from megatron_lfr.fileio import write_atomic

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
SMALLEST, USUAL, LARGEST = 600, 3500, 6000
"""Characters of a document: pieces are joined up to the usual size and cut above the largest."""
SEED = 2024
BEFORE_DEFINITION = re.compile(r"\n\n+(?= *(?:def |class |async def |@))")
BEFORE_PARAGRAPH = re.compile(r"\n\n+")


def pack(pieces: Iterable[str]) -> Iterator[str]:
    """Join pieces to documents of about the usual size; larger pieces are cut at line ends."""
    document = ""
    for piece in (part for long in pieces for part in cut(long)):
        if (document and len(document) + len(piece) > LARGEST) or len(document) > USUAL:
            yield document
            document = ""
        document += ("\n\n" if document else "") + piece
    if len(document) >= SMALLEST:
        yield document


def cut(piece: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in piece.splitlines():
        if lines and size + len(line) > LARGEST:
            yield "\n".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield "\n".join(lines)


def split_docstrings(source: str, module: str) -> tuple[str, list[str]]:
    """Return the source without its docstrings (comments stay), and the docstrings, each under its qualified name."""
    lines = source.splitlines(keepends=True)
    docstrings: list[tuple[ast.Expr, bool]] = []
    texts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                docstrings.append((statement, len(node.body) == 1 and not isinstance(node, ast.Module)))
                texts.append(f"{name}\n{text}")
        for child in ast.iter_child_nodes(node):
            below = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            visit(child, f"{name}.{child.name}" if below else name)  # type: ignore[attr-defined]

    visit(ast.parse(source), module)
    for statement, is_only in sorted(docstrings, key=lambda pair: -pair[0].lineno):
        remove(lines, statement, is_only)
    return re.sub(r"\n{3,}", "\n\n\n", "".join(lines)), texts


def remove(lines: list[str], statement: ast.Expr, is_only: bool) -> None:
    """Take a docstring out of `lines`; `pass` stays where a body would be empty or its line holds more."""
    assert statement.end_lineno is not None
    assert statement.end_col_offset is not None
    first, last = statement.lineno - 1, statement.end_lineno - 1
    before = lines[first].encode()[: statement.col_offset].decode()
    after = lines[last].encode()[statement.end_col_offset :].decode()
    keep = is_only or bool(before.strip()) or after.lstrip().startswith(";")
    lines[first : last + 1] = [before + "pass" + after] if keep else ([after.lstrip()] if after.strip() else [])


def library_modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of the standard library's modules, shuffled the same way every time."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts) and not path.name.startswith("_sysconfigdata"):
            modules.append((".".join(inside.with_suffix("").parts).removesuffix(".__init__"), path))
    random.Random(SEED).shuffle(modules)
    return modules


def code_and_docstrings(characters: int) -> tuple[list[str], list[str]]:
    """Documents of both domains, from as many modules as it takes to have enough of each."""
    code: list[str] = []
    docstrings: list[str] = []
    code_size = docstrings_size = 0
    for name, path in library_modules():
        if min(code_size, docstrings_size) > 1.2 * characters:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old sources warn about their escapes
                source, texts = split_docstrings(path.read_text(encoding="utf-8"), name)
        except (SyntaxError, UnicodeDecodeError):
            continue
        code += pack(BEFORE_DEFINITION.split(source.strip()))
        code_size = sum(map(len, code))
        docstrings += pack(texts)
        docstrings_size = sum(map(len, docstrings))
    return code, docstrings


def reference() -> list[str]:
    """Return the topics of help(): language reference, data model, grammar."""
    return [document for name in sorted(topics) for document in pack(BEFORE_PARAGRAPH.split(topics[name].strip()))]


CATEGORIES = {
    "Lu": "an uppercase letter", "Ll": "a lowercase letter", "Lt": "a titlecase letter", "Lm": "a modifier letter",
    "Lo": "a letter without case", "Mn": "a nonspacing mark", "Mc": "a spacing mark", "Me": "an enclosing mark",
    "Nd": "a decimal digit", "Nl": "a letter used as a number", "No": "a number of another kind",
    "Pc": "a connecting punctuation mark", "Pd": "a dash", "Ps": "an opening bracket", "Pe": "a closing bracket",
    "Pi": "an opening quotation mark", "Pf": "a closing quotation mark", "Po": "a punctuation mark",
    "Sm": "a mathematical symbol", "Sc": "a currency sign", "Sk": "a modifier symbol", "So": "a symbol",
    "Zs": "a space", "Zl": "a line separator", "Zp": "a paragraph separator", "Cf": "a formatting character",
}  # fmt: skip
DIRECTIONS = {
    "L": "from left to right", "R": "from right to left", "AL": "from right to left, as Arabic letters do",
    "EN": "as European digits do", "AN": "as Arabic digits do", "NSM": "in the direction of its base character",
    "ON": "in the direction of its surroundings", "ET": "beside European digits, as their terminator",
    "ES": "between European digits, as their separator", "CS": "between digits, as a common separator",
    "WS": "as white space", "BN": "nowhere: it is neutral at boundaries",
}  # fmt: skip
OPENINGS = (
    "{name} ({code}) is {category}.",
    "The character {code}, {name}, is {category}.",
    "{code} stands for {name}; it counts as {category}.",
    "Unicode calls {code} {name} and classes it as {category}.",
    "Among the characters near {row} there is {name}, {category}, at {code}.",
)


def character_facts(character: str, choose: random.Random) -> str:
    """Return a few sentences on a character, in varying words and order."""
    code = f"U+{ord(character):04X}"
    name, category = unicodedata.name(character), CATEGORIES.get(unicodedata.category(character), "unclassified")
    row = f"U+{ord(character) // 256:02X}00"
    facts = [
        f"In UTF-8 it is {choose.choice(('written', 'stored', 'encoded'))} as {character.encode().hex(' ')}.",
        choose.choice(("Here it is: {}", "It looks like this: {}", "It is printed as {}")).format(character) + ".",
    ]
    direction = DIRECTIONS.get(unicodedata.bidirectional(character))
    if direction:
        facts.append(choose.choice(("It runs {}.", "In mixed text it is laid out {}.")).format(direction))
    value = unicodedata.numeric(character, None)
    if value is not None:
        facts.append(choose.choice(("Its value is {:g}.", "As a number it is worth {:g}.")).format(value))
    parts = unicodedata.decomposition(character).split()
    if parts:
        kind = f"for {parts.pop(0).strip('<>')} use " if parts[0].startswith("<") else ""
        names = " and ".join(unicodedata.name(chr(int(part, 16)), f"U+{part}") for part in parts)
        facts.append(f"It decomposes {kind}into {names}.")
    if unicodedata.combining(character):
        facts.append(f"It combines with the letter before it, in class {unicodedata.combining(character)}.")
    for verb, other in (("Its capital is", character.upper()), ("Its small form is", character.lower())):
        if len(other) == 1 and other != character:
            facts.append(f"{verb} {other}, {unicodedata.name(other, 'nameless')}.")
    if unicodedata.mirrored(character):
        facts.append("It is mirrored in text that runs from right to left.")
    if unicodedata.east_asian_width(character) in "WF":
        facts.append("East Asian type sets it in a full square.")
    choose.shuffle(facts)
    opening = choose.choice(OPENINGS).format(name=name, code=code, category=category, row=row)
    return " ".join([opening, *facts[: choose.randint(2, 4)]])


def unicode_facts(characters: int) -> list[str]:
    """Documents on runs of neighbouring characters. Ideographs and syllables, all named alike, are left out."""
    dull = ("CJK ", "HANGUL SYLLABLE", "VARIATION SELECTOR", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN", "ANATOLIAN")
    known = [c for c in map(chr, range(32, 0x1FB00)) if not unicodedata.name(c, "CJK ").startswith(dull)]
    choose = random.Random(SEED)
    starts = list(range(0, len(known), 16))
    choose.shuffle(starts)
    documents: list[str] = []
    size = 0
    for start in starts:
        if size > 1.2 * characters:
            break
        facts = "\n".join(character_facts(character, choose) for character in known[start : start + 16])
        documents += pack([facts])
        size = sum(map(len, documents))
    return documents


def take(documents: list[str], n_bytes: int) -> list[str]:
    """Shuffled documents of `n_bytes` in UTF-8 together, or all where there is less."""
    documents = sorted(set(documents))
    random.Random(SEED).shuffle(documents)
    taken, size = [], 0
    for document in documents:
        if size >= n_bytes:
            break
        taken.append(document)
        size += len(document.encode())
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    parser.add_argument("--kilobytes-per-domain", type=int, default=300, help="size of each domain (default: 300)")
    args = parser.parse_args()
    if args.kilobytes_per_domain < 1:
        parser.error("--kilobytes-per-domain: must be at least 1")
    n_bytes = 1000 * args.kilobytes_per_domain
    code, docstrings = code_and_docstrings(n_bytes)
    domains = {
        "code": take(code, n_bytes),
        "docstrings": take(docstrings, n_bytes),
        "reference": take(reference(), n_bytes),
        "unicode": take(unicode_facts(n_bytes), n_bytes),
    }
    lines = [
        json.dumps({"domain": domain, "text": text}, ensure_ascii=False)
        for domain, documents in domains.items()
        for text in documents
    ]
    write_atomic(args.output, "\n".join(lines) + "\n")
    print(f"{'domain':<12}{'documents':>10}{'kB':>8}")
    for domain, documents in domains.items():
        print(f"{domain:<12}{len(documents):>10}{sum(len(text.encode()) for text in documents) / 1000:>8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

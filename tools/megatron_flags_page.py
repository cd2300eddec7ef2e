"""Writes docs/megatron_flags.md, the table of Megatron-LM's flags that are no settings here.

python tools/megatron_flags_page.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from megatron_lfr.megatron_flags import read_table

PAGE = Path(__file__).parents[1] / "docs" / "megatron_flags.md"
HEAD = """# Megatron-LM's flags that are no settings here

`megatron-lfr train` takes an argument list of Megatron-LM. Most flags are settings under the same names (`megatron-lfr
train --help`). Those below are accepted with a note, because they ask for what is done anyway or only tune speed, or
refused with what to give instead. Made by `tools/megatron_flags_page.py` from `megatron_lfr/megatron_flags.csv`.
"""


def render() -> str:
    """Return the page, in Markdown."""
    parts = [HEAD]
    for (verdict, part), rows in groupby(read_table(), lambda row: (row["verdict"], row["part"])):
        last = "legal values" if verdict == "accepted" else "instead"
        subject = part if part == "DeepSpeed" else f"{part[0].lower()}{part[1:]}"
        parts.append(f"\n## {verdict.capitalize()}: {subject}\n\n")
        parts.append(f"| flags | why | {last} |\n|---|---|---|\n")
        for row in rows:
            what = (
                _code(row["legal"], "any" if row["values"] != "0" else "") if verdict == "accepted" else row["instead"]
            )
            parts.append(f"| {_code(row['flags'])} | {row['reason']} | {what} |\n")
    return "".join(parts)


def _code(words: str, without: str = "") -> str:
    """Return the words in type of their own; `without` where there are none."""
    return ", ".join(f"`{word}`" for word in words.split()) or without


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

"""Makes README's table of measurements from the records in benchmarks/, as benchmarks/readme.yaml says.

    python tools/readme_tables.py [--check]

Without --check, the table in README.md is replaced; with it, the exit code is 1 where it differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin: tools/readme_tables.py -->", "<!-- end: tools/readme_tables.py -->"


def table(root: Path = ROOT) -> str:
    """Return the table. ValueError names a record in which a figure is missing, or is there twice."""
    records = root / "benchmarks"
    entries = yaml.safe_load((records / "readme.yaml").read_text(encoding="utf-8"))
    rows = [
        f"| {entry['what']} | {text(entry, records)} | [record](benchmarks/{entry['record']}) |" for entry in entries
    ]
    return "\n".join(["| | | |", "|---|---|---|", *rows])


def text(entry: dict[str, Any], records: Path) -> str:
    """Return what a row says, with the figures of its record."""
    content = (records / entry["record"]).read_text(encoding="utf-8")
    values: dict[str, float] = {}
    for search in entry["find"]:
        matches = re.findall(search["pattern"], content)
        if len(matches) != 1:
            raise ValueError(f"{entry['record']}: {len(matches)} matches of {search['pattern']}")
        words = matches[0] if isinstance(matches[0], tuple) else (matches[0],)
        values |= {name: _number(word) for name, word in zip(search["names"], words, strict=True)}
    if among := [values[name] for name in entry.get("extremes", [])]:
        values |= {"least": min(among), "most": max(among)}
    filled: str = entry["text"].format(**values)
    return re.sub(r"(\d)%", r"\1 %", filled.replace("-0.", "−0."))


def _number(word: str) -> float:
    return float(word.replace(",", "").replace("−", "-"))


def with_table(readme: str, rows: str) -> str:
    """Return README's text with the table between the marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = ROOT / "README.md"
    was = page.read_text(encoding="utf-8")
    now = with_table(was, table())
    if not args.check:
        page.write_text(now, encoding="utf-8")
    elif was != now:
        print("README.md: the table of measurements differs from the records; run tools/readme_tables.py")
    return int(args.check and was != now)


if __name__ == "__main__":
    sys.exit(main())

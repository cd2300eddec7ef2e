"""The HTML of pages on runs in every state."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.report.command import ReportConfig, write_report


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """A page's structure; an element that is not closed where it should be is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        given = dict(attrs)
        assert not any(name.startswith("on") or name == "style" for name in given)
        self.references += [str(given[name]) for name in ("href", "src", "action", "data", "srcset") if name in given]
        if given.get("id"):
            assert given["id"] not in self.ids
            self.ids.add(str(given["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def make(*runs: Path, **options: Any) -> tuple[str, Page]:
    text = write_report(ReportConfig(runs, **options)).read_text(encoding="utf-8")
    page = Page(text)
    for reference in page.references:  # to places of the page itself, and nowhere else
        assert reference[0] == "#"
        assert reference[1:] in page.ids
    assert not re.search(r"https?:|url\(|@import|\bnan\b|\binf\b", re.sub(r"<pre>.*?</pre>", "", text, flags=re.S))
    for plot in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        _check_plot(ET.fromstring(plot))
    return text, page


def _check_plot(plot: ET.Element) -> None:
    """Every mark lies inside the plot."""
    _, _, width, height = map(float, plot.attrib["viewBox"].split())
    assert plot.attrib["aria-label"]
    for node in plot.iter():
        xs = [float(node.attrib[name]) for name in ("x", "x1", "x2", "cx") if name in node.attrib]
        ys = [float(node.attrib[name]) for name in ("y", "y1", "y2", "cy") if name in node.attrib]
        for point in node.attrib.get("points", "").split():
            x, y = point.split(",")
            xs.append(float(x))
            ys.append(float(y))
        assert all(-1 <= x <= width + 1 for x in xs), (plot.attrib["aria-label"], ET.tostring(node)[:300])
        assert all(-1 <= y <= height + 1 for y in ys), (plot.attrib["aria-label"], ET.tostring(node)[:300])


def test_a_finished_run(run_folder: Path) -> None:
    text, page = make(run_folder)
    assert (run_folder / "report.html").exists()
    assert {"losses", "distribution", "focus", "forgetting", "blocks", "cost", "similarity"} <= page.ids
    assert page.counts["svg"] > 20
    assert len(text) < 600_000
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; ")
    assert "unsafe" not in policy.group(1)


def test_the_numbers_on_the_page_are_the_runs(run_folder: Path) -> None:
    _, page = make(run_folder)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "evaluation":
            assert f"{row['loss']:.4f}" in page.text
            assert all(f"{loss:.4f}" in page.text for loss in row["domains"].values())
    scored = json.loads((run_folder / "journal" / "meta.json").read_text())["segments"][0]["blocks"]
    dropped = [
        int(0.5 * scored),
        int(0.7 * scored),
    ]  # the two Focus phases of `lfr`, the first within the second or not
    assert f"{np.sqrt(dropped[0] * dropped[1]) / scored:.2f}" in page.text  # cosine by chance


def test_several_runs_at_equal_tokens(run_folder: Path, uniform_run: Path) -> None:
    _, page = make(run_folder, uniform_run)
    assert "comparison" in page.ids
    assert "(lfr)" in page.text
    assert "(uniform)" in page.text
    losses = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (run_folder, uniform_run)
    ]
    ends = [[row for row in rows if row["event"] == "evaluation"] for rows in losses]
    tokens = [max(row["consumed_tokens"] for row in rows if row["event"] == "train") for rows in losses]
    assert tokens[1] < tokens[0]
    assert f"At {tokens[1]:,} tokens" in page.text
    assert f"{ends[1][-1]['loss']:.4f}" in page.text
    assert "≈" in page.text  # the longer run was not evaluated there


def test_runs_over_different_corpora(run_folder: Path, made_run: Path) -> None:
    edit_json(run_folder / "journal" / "meta.json", corpus="0" * 64)
    text, page = make(run_folder, made_run)
    assert "trained on different corpora" in page.text
    assert "At equal tokens" not in page.words
    assert "different corpora: their blocks cannot be compared" in text


def test_dropped_sets_of_two_runs(run_folder: Path, made_run: Path) -> None:
    _, page = make(run_folder, made_run)
    heat = page.text[page.text.rindex("How alike the dropped sets are") :]
    assert heat.count("1.00") == 2 * (4 + 4)  # each of four sets is itself and its twin in the other run, in two tables


def test_a_run_that_has_only_begun(run_folder: Path) -> None:
    for phase in range(1, 5):
        (run_folder / "journal" / f"phase_{phase:03d}.npy").unlink()
    path = run_folder / "journal" / "phase_000.npy"
    path.write_bytes(path.read_bytes()[: 128 + 4 * 200])  # a step and a half
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # half a line is being written
    _, page = make(run_folder)
    assert "No phase has ended yet." in page.text
    assert "No Focus has been trained in this run" in page.text
    assert "1 of 5 phases begun" in page.text


@pytest.mark.parametrize("losses", [True, False])
def test_a_run_before_its_first_step(run_folder: Path, losses: bool) -> None:
    for path in (run_folder / "journal").glob("phase_*"):
        path.unlink()
    if losses:
        (run_folder / "metrics.jsonl").write_text("")
    else:
        (run_folder / "metrics.jsonl").unlink()
    _, page = make(run_folder)
    assert "Nothing has been trained on yet." in page.text


def test_a_run_without_validation(run_folder: Path, uniform_run: Path) -> None:
    path = run_folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"evaluation"' not in line]
    path.write_text("".join(lines))
    _, page = make(run_folder)
    assert "This run has no validation loss" in page.text
    _, page = make(run_folder, uniform_run)
    assert "No validation loss to compare in" in page.text


@pytest.mark.parametrize("missing", ["corpus", "tokenizer", "config", "other corpus"])
def test_what_is_missing_is_named(run_folder: Path, missing: str) -> None:
    config = run_folder / "config.yaml"
    if missing == "corpus":
        config.write_text(config.read_text().replace("/data/", "/nowhere/"))
    elif missing == "tokenizer":
        config.write_text(config.read_text().replace("tokenizer_model: bytes", "tokenizer_model: /nowhere.json"))
    elif missing == "config":
        config.unlink()
    else:
        edit_json(run_folder / "journal" / "meta.json", corpus="0" * 64)
    _, page = make(run_folder)
    assert "text cannot be shown" in page.text
    assert ("Nothing is shown by domain" in page.text) == (missing != "tokenizer")
    assert "pre" not in page.counts


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\0\x1b[2J\u202e&amp;\"'<!--"


def test_hostile_text_stays_text(run_folder: Path, tool: ModuleType, tmp_path: Path) -> None:
    meta = json.loads((run_folder / "journal" / "meta.json").read_text())
    corpus = Path(str(np.array(_prefixes(run_folder))[0])).parent
    copied = tmp_path / "data"
    shutil.copytree(corpus, copied)
    (run_folder / "config.yaml").write_text((run_folder / "config.yaml").read_text().replace(str(corpus), str(copied)))
    hostile = HOSTILE.encode()
    for path in copied.glob("*.bin"):
        tokens = np.resize(np.frombuffer(hostile, np.uint8), path.stat().st_size // 2)
        path.write_bytes(tokens.astype("<u2").tobytes())
    digests = BlockDataset(_prefixes(run_folder), meta["seq_length"], tool.SPLIT).digests()
    edit_json(run_folder / "journal" / "meta.json", corpus=digests)
    folder = run_folder.rename(run_folder.with_name("<b>bold&\"quoted'"))
    text, page = make(folder)
    assert page.counts["script"] == 1
    assert "img" not in page.counts
    assert "b>bold&" in page.text
    assert "alert(" in page.text  # as text
    assert "\0" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x00" in page.text


def _prefixes(run: Path) -> list[str]:
    return re.findall(r"^- (.*)$", (run / "config.yaml").read_text(), flags=re.M)


def test_unseen_blocks_are_shown(hurried_runs: list[Path], tmp_path: Path) -> None:
    kept, excluded = (make(run, output=tmp_path / "page.html")[0] for run in hurried_runs)  # tips are part of it
    assert "never seen, kept" in kept
    assert "never seen, left out" not in kept
    assert "never seen, left out" in excluded
    assert "never seen, kept" not in excluded
    for text in (kept, excluded):
        assert "unseen: 50.0 % of all blocks" in text

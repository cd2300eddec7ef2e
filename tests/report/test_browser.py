"""The page in a real browser: it draws, it shows values, it asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lfr.report.command import ReportConfig, write_report
from support.browser import Page, browser_page, find_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def page(made_run: Path, uniform_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A report on two runs, loaded."""
    folder = tmp_path_factory.mktemp("browser")
    path = write_report(ReportConfig((made_run, uniform_run), output=folder / "page.html"))
    assert BROWSER is not None
    with browser_page(BROWSER, folder / "profile") as tab:
        tab.resize(1280, 900)
        tab.open(path)
        yield tab


def test_nothing_is_loaded_and_nothing_goes_wrong(page: Page) -> None:
    reported = {event["method"] for event in page.events}
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) == 1  # the page itself
    assert asked[0].startswith("file:")
    assert not reported & {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}


def test_the_policy_forbids_the_network(page: Page) -> None:
    seen = len(page.events)
    page.evaluate("new Image().src = 'https://example.org/x.png'; 0")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.hit = 1\" id=inline></p>'); 0")
    page.evaluate("document.getElementById('inline').click(); 0")
    entries = [event["params"]["entry"]["text"] for event in page.events[seen:] if event["method"] == "Log.entryAdded"]
    assert any("Content Security Policy" in text for text in entries)
    assert page.evaluate("window.hit === undefined")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_every_plot_has_marks_that_can_be_seen(page: Page, width: int, dark: bool) -> None:
    page.resize(width, 900, dark)
    found = page.evaluate("""
        [...document.querySelectorAll("svg.plot")].map((plot) => {
            const ground = getComputedStyle(plot.closest("section")).backgroundColor;
            const marks = [...plot.querySelectorAll(".line, .mark, .part")].filter((mark) => {
                const style = getComputedStyle(mark), box = mark.getBoundingClientRect();
                const colour = style.fill === "none" ? style.stroke : style.fill;
                const drawn = colour !== "none" && colour !== ground && style.visibility === "visible";
                return drawn && box.width + box.height > 0.5;
            });
            return [plot.getAttribute("aria-label"), marks.length, plot.getBoundingClientRect().width];
        })
    """)
    assert len(found) > 30
    assert all(marks > 0 and wide > 250 for _, marks, wide in found), found
    # the page itself never scrolls sideways: what is too wide scrolls in its own box
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_scheme_changes_the_colours(page: Page) -> None:
    grounds = []
    for dark in (False, True):
        page.resize(1280, 900, dark)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_values_show_under_the_pointer_and_by_keys(page: Page) -> None:
    page.resize(1280, 900)
    plot = 'document.querySelector("svg.lines")'
    box = page.evaluate(f"{plot}.scrollIntoView(), (({{x, y, width, height}}) => [x, y, width, height])"
                        f"({plot}.getBoundingClientRect())")  # fmt: skip
    page.move_pointer(box[0] + 0.7 * box[2], box[1] + 0.5 * box[3])
    shown = page.evaluate('document.getElementById("tip").textContent')
    assert "tokens trained on" in shown
    losses = page.evaluate(f'{plot}.querySelector(".line").dataset.ys').split()
    assert any(f"{float(loss):.4f}" in shown for loss in losses)
    page.move_pointer(2, 2)
    assert page.evaluate('document.getElementById("tip").hidden')
    page.evaluate(f"{plot}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}})); 0")
    assert f"{float(losses[0]):.4f}" in page.evaluate('document.getElementById("tip").textContent')

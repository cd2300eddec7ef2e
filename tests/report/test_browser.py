"""The page in a real browser draws, shows values, and loads nothing from the network."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.report.command import ReportConfig, write_report
from support.browser import Page, browser_page, find_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def page(made_run: Path, uniform_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Load a report on two runs."""
    folder = tmp_path_factory.mktemp("browser")
    path = write_report(ReportConfig((made_run, uniform_run), output=folder / "page.html"))
    assert BROWSER is not None
    with browser_page(BROWSER, folder / "profile") as tab:
        tab.resize(1280, 900)
        tab.open(path)
        yield tab


def test_nothing_is_loaded_and_nothing_goes_wrong(page: Page) -> None:
    reported = {event["method"] for event in page.events}
    requested = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(requested) == 1  # the page itself
    assert requested[0].startswith("file:")
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
    plots = page.evaluate("""
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
    assert len(plots) > 30
    assert all(marks > 0 and wide > 250 for _, marks, wide in plots), plots
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
    losses = page.evaluate(f'{plot}.querySelector(".series").dataset.ys').split()
    assert any(f"{float(loss):.4f}" in shown for loss in losses)
    page.move_pointer(2, 2)
    assert page.evaluate('document.getElementById("tip").hidden')
    page.evaluate(f"{plot}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}})); 0")
    assert f"{float(losses[0]):.4f}" in page.evaluate('document.getElementById("tip").textContent')


BY_DOMAIN = "document.querySelector(\"svg.lines[aria-label='Validation loss by domain over tokens']\")"
"""Four lines of five or six points, which are marked."""


@pytest.fixture
def plot(page: Page) -> Iterator[Page]:
    """Yield the page with BY_DOMAIN in view, as it was at first; afterwards it must be so again."""
    page.resize(1280, 900)
    page.evaluate(f"{BY_DOMAIN}.scrollIntoView(); 0")
    before = page.evaluate(f"{BY_DOMAIN}.outerHTML")
    yield page
    page.evaluate(f"{BY_DOMAIN}.dispatchEvent(new MouseEvent('dblclick')); 0")
    after = page.evaluate(f"{BY_DOMAIN}.outerHTML")
    assert np.array(marks(after)) == pytest.approx(np.array(marks(before)), abs=0.15)  # rounded to 0.1 pixels
    assert [text for text, *_ in texts(after)] == [text for text, *_ in texts(before)]
    assert np.array([at for _, *at in texts(after)]) == pytest.approx(
        np.array([at for _, *at in texts(before)]), abs=0.15
    )


def marks(plot: str) -> list[tuple[float, float]]:
    """Where the visible points of all lines are."""
    nodes = (node.attrib for node in ET.fromstring(plot).iter() if node.attrib.get("class") == "mark")
    return [(round(float(node["cx"]), 1), round(float(node["cy"]), 1)) for node in nodes]


def texts(plot: str) -> list[tuple[str, float, float]]:
    """All text with its position."""
    nodes = (node for node in ET.fromstring(plot).iter() if node.tag.endswith("text"))
    return [(node.text or "", round(float(node.attrib["x"]), 1), round(float(node.attrib["y"]), 1)) for node in nodes]


def read_points(page: Page) -> dict[str, list[tuple[float, float]]]:
    """(tokens, loss) of every visible mark by its line's name, as a reader would read them from the axes."""
    state: dict[str, Any] = page.evaluate(f"""(() => {{
        const numerals = (kind, place) => [...{BY_DOMAIN}.querySelectorAll(`.${{kind}} text`)]
            .map((node) => [Number(node.getAttribute(place)), Number(node.textContent)]);
        const seen = (mark) => getComputedStyle(mark).visibility === "visible";
        const place = ({{cx, cy}}) => [cx.baseVal.value, cy.baseVal.value];
        const lines = [...{BY_DOMAIN}.querySelectorAll(".series")].map((group) =>
            [group.dataset.name, [...group.querySelectorAll(".mark")].filter(seen).map(place)]);
        return {{x: numerals("x-ticks", "x"), y: numerals("y-ticks", "y"), lines}};
    }})()""")
    assert all(len(state[axis]) >= 2 for axis in ("x", "y"))
    axes = [np.polynomial.Polynomial.fit(*np.transpose(state[axis]), 1) for axis in ("x", "y")]
    shift = 4  # numerals stand with their feet so far below their line
    return {name: [(axes[0](x), axes[1](y + shift)) for x, y in points] for name, points in state["lines"]}


def held_points(page: Page) -> dict[str, list[tuple[float, float]]]:
    """(tokens in thousands, loss) of all points that the page holds."""
    rows = page.evaluate(f"""[...{BY_DOMAIN}.querySelectorAll(".series")].map((group) =>
        [group.dataset.name, group.dataset.xs.split(" ").map(Number), group.dataset.ys.split(" ").map(Number)])""")
    unit = page.evaluate(f"Number({BY_DOMAIN}.dataset.unit)")
    return {name: [(x / unit, y) for x, y in zip(xs, ys, strict=True)] for name, xs, ys in rows}


def press(page: Page, key: str, shift: bool = False) -> None:
    page.evaluate(
        f"{BY_DOMAIN}.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', shiftKey: {str(shift).lower()}}})); 0"
    )


def test_a_stretch_that_is_dragged_over_fills_the_plot(plot: Page) -> None:
    held = held_points(plot)
    assert {name: len(points) for name, points in read_points(plot).items()} == {n: len(p) for n, p in held.items()}
    x, y, wide, high = plot.evaluate(
        f"(({{x, y, width, height}}) => [x, y, width, height])({BY_DOMAIN}.getBoundingClientRect())"
    )
    for kind, share in (("mousePressed", 0.5), ("mouseMoved", 0.6), ("mouseMoved", 0.8), ("mouseReleased", 0.8)):
        plot.call(
            "Input.dispatchMouseEvent", type=kind, x=x + share * wide, y=y + high / 2, button="left", buttons=1,
            clickCount=1,
        )  # fmt: skip
    seen = read_points(plot)
    for name, points in seen.items():
        assert 0 < len(points) < len(held[name])
        for point in points:
            nearest = min(held[name], key=lambda one: abs(one[0] - point[0]))
            assert point == pytest.approx(nearest, abs=0.02 * max(nearest))


def test_zoom_by_keys_and_buttons(plot: Page) -> None:
    held = held_points(plot)
    press(plot, "ArrowRight")
    press(plot, "+")  # about the first evaluation
    zoomed = read_points(plot)
    assert all(len(zoomed[name]) < len(held[name]) for name in held)
    assert all(points[0][0] == pytest.approx(held[name][0][0], rel=0.02) for name, points in zoomed.items())
    press(plot, "ArrowRight", shift=True)
    press(plot, "ArrowRight", shift=True)
    press(plot, "ArrowRight", shift=True)
    moved = read_points(plot)
    assert all(points[-1][0] > zoomed[name][-1][0] for name, points in moved.items())
    press(plot, "Escape")
    assert {name: len(points) for name, points in read_points(plot).items()} == {n: len(p) for n, p in held.items()}
    buttons = f"[...{BY_DOMAIN}.closest('figure').querySelectorAll('.tools button')]"
    assert plot.evaluate(
        f"{buttons}.every((one) => one.getAttribute('aria-label').includes('Validation loss by domain'))"
    )
    plot.evaluate(f"{buttons}[1].click(); 0")
    assert any(len(points) < len(held[name]) for name, points in read_points(plot).items())
    plot.evaluate(f"{buttons}[4].click(); 0")


def test_lines_are_turned_off_and_on_in_the_legend(plot: Page) -> None:
    held = held_points(plot)
    button = f"{BY_DOMAIN}.closest('figure').querySelector('.legend button')"
    first = plot.evaluate(f"{button}.textContent")
    for pressed in ("false", "true"):
        plot.evaluate(f"{button}.focus(); 0")
        for kind in ("keyDown", "keyUp"):
            plot.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
            )
        assert plot.evaluate(f"{button}.getAttribute('aria-pressed')") == pressed
        seen = read_points(plot)
        assert len(seen[first]) == (len(held[first]) if pressed == "true" else 0)
        for name in set(held) - {first}:
            assert np.array(seen[name]) == pytest.approx(np.array(held[name]), rel=0.02)


def test_the_y_axis_fits_what_is_shown(plot: Page) -> None:
    losses = f"[...{BY_DOMAIN}.querySelectorAll('.y-ticks text')].map((node) => Number(node.textContent))"
    others = (
        f"[...{BY_DOMAIN}.closest('figure').querySelectorAll('.legend button')].slice(1).forEach((one) => one.click())"
    )
    before = plot.evaluate(losses)
    plot.evaluate(f"{others}; 0")
    alone = plot.evaluate(losses)
    assert max(alone) - min(alone) < (max(before) - min(before)) / 4
    plot.evaluate(f"{others}; 0")


def test_the_first_steps_stay_cut_off_until_one_zooms_in(page: Page) -> None:
    plot = "document.querySelector('svg.lines[aria-label=\"Training loss over tokens\"]')"
    losses = f"[...{plot}.querySelectorAll('.y-ticks text')].map((node) => Number(node.textContent))"
    before = page.evaluate(losses)
    buttons = f"[...{plot}.closest('figure').querySelectorAll('.tools button')]"
    page.evaluate(f"{buttons}[1].click(); {buttons}.slice(2, 3).forEach((one) => {{ one.click(); one.click(); }}); 0")
    assert page.evaluate(losses) != before
    page.evaluate(f"{buttons}[4].click(); 0")
    assert page.evaluate(losses) == before


def test_a_legend_of_runs_holds_for_all_plots_of_its_section(page: Page) -> None:
    plots = "[...document.querySelectorAll('#comparison svg.lines')]"
    count = page.evaluate(f"{plots}.length")
    assert count > 4
    for off in (count, 0):
        page.evaluate("document.querySelector('#comparison .legend button').click(); 0")
        assert page.evaluate(f"{plots}.filter((plot) => plot.querySelector('.series.off')).length") == off


def test_a_plot_is_saved_as_it_is_seen(plot: Page, tmp_path: Path) -> None:
    plot.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    press(plot, "+")
    ends = plot.evaluate(f"getComputedStyle({BY_DOMAIN}.querySelector('.line')).stroke")
    plot.evaluate(f"{BY_DOMAIN}.closest('figure').querySelector('.tools button:last-child').click(); 0")
    plot.wait_for("Browser.downloadProgress", lambda event: event["state"] == "completed")
    saved = (tmp_path / "Validation-loss-by-domain-over-tokens.svg").read_text()
    root = ET.fromstring(saved)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert marks(saved) == marks(plot.evaluate(f"{BY_DOMAIN}.outerHTML"))
    lines = [node.attrib for node in root.iter() if node.attrib.get("class") == "line"]
    assert lines[0]["stroke"] == ends
    assert {node["fill"] for node in lines} == {"none"}
    names = [node.attrib for node in root.iter() if node.attrib.get("class") == "end"]
    assert names
    assert all(node["visibility"] == "hidden" for node in names)
    press(plot, "Escape")


def test_without_the_script_the_plots_are_complete(made_run: Path, tmp_path: Path) -> None:
    path = write_report(ReportConfig((made_run,), output=tmp_path / "page.html"))
    text = path.read_text()
    path.write_text(text[: text.index("<script>")] + text[text.index("</script>") :])
    assert BROWSER is not None
    with browser_page(BROWSER, tmp_path / "profile") as tab:
        tab.open(path)
        assert tab.evaluate("document.querySelectorAll('button').length") == 0
        assert sum(len(points) for points in read_points(tab).values()) == sum(map(len, held_points(tab).values())) > 0

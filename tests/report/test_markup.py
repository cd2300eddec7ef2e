"""Text of a corpus stays text, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.output import visible
from megatron_lfr.report.markup import Html, element, join


class Reader(HTMLParser):
    """The tags, attributes and text that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(max_size=30))
def test_text_and_attributes_come_back_as_text(text: str) -> None:
    read = Reader(element("pre", text, data_tip=text))
    assert read.tags == ["pre"]
    assert read.text == visible(text, keep="\n\t")
    assert read.attributes == {"data-tip": visible(text, keep="\n\t")}


@pytest.mark.parametrize(
    "text",
    ["</script><script>alert(1)</script>", "<!--", "]]>", "&lt;", "\" onload='x'", "<img src=x onerror=alert(1)>"],
)
def test_hostile_markup_makes_no_element(text: str) -> None:
    read = Reader(element("p", text, title=text))
    assert read.tags == ["p"]
    assert read.text == text
    assert set(read.attributes) == {"title"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\0b\x1b[31m\x7f", "a\\x00b\\x1b[31m\\x7f"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\r\n", "\\r\n"),
        ("\u202egnp.exe", "\\u202egnp.exe"),  # would be read from right to left
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\x85\ud800\U000e0041", "\\x85\\ud800\\U000e0041"),
        ("Grüße, 漢字 and 🙂", "Grüße, 漢字 and 🙂"),
        ("no-break\xa0and ideographic\u3000space", "no-break\xa0and ideographic\u3000space"),
    ],
)
def test_what_does_not_show_is_named(text: str, shown: str) -> None:
    assert visible(text, keep="\n\t") == shown
    assert Reader(element("p", text)).text == shown
    element("p", text).encode()  # lone surrogates would not go into a file


def test_markup_is_not_escaped_again() -> None:
    assert element("b", element("i", "x < y"), None, 3) == "<b><i>x &lt; y</i>3</b>"
    assert join(["<", Html("<br>")]) == "&lt;<br>"
    assert element("line", x1=0.5, class_="grid", data_tip=None) == '<line x1="0.5" class="grid"></line>'
    assert element("p", title=Html('"')) == '<p title="&quot;"></p>'

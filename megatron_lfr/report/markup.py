"""HTML and SVG as text that is escaped unless it is markup already.

Whatever comes from a corpus or a path is an ordinary string, and `element` escapes ordinary strings: nothing has to be
remembered where text is shown.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# What a browser would not draw, or what would change how its surroundings are drawn: control characters (tab and line
# feed stay), soft hyphens, marks of direction, invisible joiners, separators, lone surrogates, private use and tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)
_CONTROL_PICTURES = 0x2400


class Html(str):
    """Text that is markup: it goes into the page as it stands."""

    __slots__ = ()


Content = str | int | float | None
"""What `element` takes as a child: markup, text to be escaped, a number, or None for nothing."""


def visible(text: str) -> str:
    """The text with every character that would not show replaced: U+0000 by ␀, U+202E by [U+202E]."""
    return _UNSEEN.sub(_name, text)


def escape(text: str) -> Html:
    """Text as markup that shows it, in an element or in a quoted attribute."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text), quote=True))


def join(parts: Iterable[Content], between: str = "") -> Html:
    """Markup of all parts, one after another."""
    return Html(
        escape(between).join(
            part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None
        )
    )


def element(tag: str, *children: Content, **attributes: Content) -> Html:
    """`<tag attributes>children</tag>`. In attribute names, `_` stands for `-`, and a last one is dropped (`class_`);
    an attribute that is None is left out."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return Html(f"<{' '.join(words)}>{join(children)}</{tag}>")


def _name(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"

"""Makes HTML and SVG: text is escaped unless it is markup already.

Whatever comes from a corpus or a path is an ordinary string, and `element` escapes ordinary strings, so that those who
show text need not think of it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from megatron_lfr.output import visible


class Html(str):
    """Text that is markup: it goes into the page as it is."""

    __slots__ = ()


Content = str | int | float | None
"""What an element may contain: markup, text to be escaped, a number, or None for nothing."""


def escape(text: str) -> Html:
    """Return markup that shows the text, in an element or in a quoted attribute."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text, keep="\n\t"), quote=True))


def join(parts: Iterable[Content], between: str = "") -> Html:
    """Join the markup of all parts."""
    return Html(
        escape(between).join(
            part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None
        )
    )


def element(tag: str, *children: Content, **attributes: Content) -> Html:
    """Make `<tag attributes>children</tag>`. In names of attributes, `_` means `-`, and one at the end is dropped
    (`class_`); attributes that are None are left out."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return Html(f"<{' '.join(words)}>{join(children)}</{tag}>")

"""An HTML file: the style, the script, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from megatron_lfr.report.markup import Html, element, join

BEGINS = (
    b'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
    b"content=\"default-src 'none'; style-src 'sha256-"
)
"""How every page begins."""


def document(title: str, body: Html) -> str:
    """Return a page as one file that needs nothing else."""
    assets = files("megatron_lfr.report") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            element("title", title),
            Html(f"<style>{style}</style>"),
        ]
    )
    code = Html(f"<script>{script}</script>")
    page = element("html", element("head", head), element("body", body, code), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"

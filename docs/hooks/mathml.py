"""Equations become MathML when the site is built, which every browser draws itself: no script, no font, no network."""

import re
from html import unescape

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_LEFT = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_) -> str:
    """The page with its equations drawn."""
    return _LEFT.sub(_drawn, html)


def _drawn(match: re.Match) -> str:
    tag, bracket, tex = match.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="equation">{convert(unescape(tex), display=display)}</{tag}>'

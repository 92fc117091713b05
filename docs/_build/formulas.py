"""Formulas as MathML when the site is built: every current browser draws it without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what the `arithmatex` extension marked as TeX."""
    content = BLOCK.sub(lambda found: convert(html.unescape(found[1]), "block"), content)
    return INLINE.sub(lambda found: convert(html.unescape(found[1])), content)

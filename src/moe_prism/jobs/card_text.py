"""Text from elsewhere (names, licences, kinds) in a model card: shown as it is, never read as Markdown or HTML."""

from __future__ import annotations

import html
import re

from ..schema.read import one_line

MOST = 200
MARKS = re.compile(r"([\\`*_{}\[\]()#!|~$])")


def shown(text: str) -> str:
    """In a line of Markdown."""
    return MARKS.sub(r"\\\1", html.escape(one_line(text, MOST), quote=False))


def code(text: str) -> str:
    """Between backticks, where nothing else has a meaning; tags are written out all the same, for readers that do not know that."""
    return html.escape(one_line(text, MOST).replace("`", "'"), quote=False)

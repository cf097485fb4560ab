"""Text from elsewhere (names, licences, kinds) in a model card: shown as it is, never read as Markdown, HTML or YAML."""

from __future__ import annotations

import html
import json
import re

from ..schema.read import one_line

MOST = 200
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
MARKS = re.compile(r"([\\`*_{}\[\]()#!|~$])")


def shown(text: str) -> str:
    """In a line of Markdown."""
    return MARKS.sub(r"\\\1", html.escape(one_line(text, MOST), quote=False))


def code(text: str) -> str:
    """Between backticks, where nothing else has a meaning; tags are written out all the same, for readers that do not know that."""
    return html.escape(one_line(text, MOST).replace("`", "'"), quote=False)


def scalar(text: str) -> str:
    """A YAML value: a plain word as it is, anything else in quotes, which are JSON's."""
    line = one_line(text, MOST)
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", line) and line.lower() not in YAML_WORDS
    return line if plain else json.dumps(line)

"""Prose for people: half of the sentences of every page have at most 16 words, and none is a labyrinth."""

from __future__ import annotations

import re
from statistics import median

import pytest

from .pages import FENCE, SPAN, name, pages

MEDIAN, LONGEST = 16, 32
"""Words. A span of code or a formula counts as one."""


def paragraphs(text: str) -> list[str]:
    """Running text: no code, tables, headings, pictures or comments; every item of a list by itself, without its marker."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", text), flags=re.S)
    text = re.sub(r"^( {4}|\|).*$|^#+ .*$|^!\[.*$", "", text, flags=re.M)
    text = re.sub(r"^ *([-*+]|\d+\.) +", "\n", text, flags=re.M)
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()]


def sentences(text: str) -> list[int]:
    """The number of words of every sentence. Colons and semicolons end none."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", SPAN.sub("code", paragraph)).replace("*", "")
        plain = re.sub(r"\b(e\.g|i\.e|vs|cf)\.", r"\1", plain)
        for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9c])", plain):
            words = len(re.findall(r"\w[\w.,%'/^-]*", sentence))
            if words > 1:
                found.append(words)
    return found


@pytest.mark.parametrize("page", pages(), ids=name)
def test_sentences_are_short(page):
    found = sentences(page.read_text("utf-8"))
    assert not found or median(found) <= MEDIAN, f"median {median(found)} words in {len(found)} sentences"
    assert max(found, default=0) <= LONGEST, f"a sentence of {max(found)} words"


def test_what_counts_as_a_sentence():
    text = """# A heading is none

One two three: four; five. Six `seven eight` nine!

- An item of four.
- [Its neighbour](docs/far-away.md) has *five*.

| a | table | is | none |
|---|---|---|---|

    nor = is / a formula

```bash
nor code
```
"""
    assert sentences(text) == [5, 3, 4, 4]

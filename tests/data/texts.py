"""What the tests of text share: two sentences, and how a path is read."""

from __future__ import annotations

import json

from moe_prism.data import read_documents
from moe_prism.data.text import Reading
from moe_prism.tally import TextTally

HI, YO = "How do I sort a list?", "Call sorted(list)."


def read(path, *names):
    """(texts, tally) of a path."""
    tally = TextTally(str(path))
    return [d.text for d in read_documents(path, Reading(tally, names))], tally


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path

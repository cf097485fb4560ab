"""The README.md of a model without some of its neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def sliced_card(facts: Mapping[str, Any], method: str, model_type: str) -> str:
    """Markdown."""
    source, found = facts["source"]["name"], facts["result"]
    title = f"{shown(source)}, {found['share']:.0%} of the neurons"
    if found["width"] is None:
        what = (
            f"Experts keep {found['narrowest']} to {found['widest']} of {found['of']} neurons. The others are zeros in place, so the\n"
            "files are as large as before; what does not store zeros can be smaller."
        )
    else:
        what = f"Every expert keeps {found['width']} of {found['of']} neurons, as `config.json` says."
    return f"""{front_matter(facts, model_type)}
# {title}

`{code(source)}` without the neurons of its routed experts that `{code(method)}` ranks last.
{what}
transformers and other tools load this folder as a model of the same family. `point.json` says which neurons stayed, as an
operating point of the source.

The outputs differ from the source's. `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""

"""The README.md of a model whose experts were merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def merged_card(facts: Mapping[str, Any], method: str, model_type: str) -> str:
    """Markdown."""
    source, found = facts["source"]["name"], facts["result"]
    title = f"{shown(source)}, {found['share']:.0%} of the experts"
    if found["written"] < found["of"]:
        what = f"Every layer has {found['written']} of {found['of']} experts, as `config.json` says."
    else:
        what = (
            "Merged experts stand in the places of all their members, so the files are as large as before. Stored once each, experts\n"
            f"would take {found['stored_once']:.1%}."
        )
    return f"""{front_matter(facts, model_type)}
# {title}

`{code(source)}` with its routed experts merged by `{code(method)}`.
{what}
transformers and other tools load this folder as a model of the same family. `point.json` says what became of every expert, as an
operating point of the source.

The outputs differ from the source's. `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""

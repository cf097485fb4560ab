"""The README.md of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def pruned_card(facts: Mapping[str, Any], kept: Mapping[str, Any], model_type: str) -> str:
    """Markdown."""
    source, first = facts["source"]["name"], kept["layers"][0]
    title, name = shown(source), code(source)
    if kept.get("form") == "constant":
        return constant_card(facts, kept, model_type)
    gone = first["experts"] - len(first["kept"])
    return f"""{front_matter(facts, model_type)}
# {title}, {len(first["kept"])} of {first["experts"]} experts

`{name}` without {gone} of the {first["experts"]} routed experts of every layer, chosen by `{code(kept["criterion"])}`.
Every token uses as many experts as before; fewer of them have to be in memory. transformers and other tools load
this folder as a model of the same family. `kept.json` lists the experts that stayed, by their ids in the source.

The outputs differ from the source's. `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""


def constant_card(facts: Mapping[str, Any], kept: Mapping[str, Any], model_type: str) -> str:
    """Of a model with constants in the place of experts. Markdown."""
    source = facts["source"]["name"]
    stay, all_ = sum(len(row["kept"]) for row in kept["layers"]), sum(row["experts"] for row in kept["layers"])
    return f"""{front_matter(facts, model_type)}
# {shown(source)}, {all_ - stay} of {all_} experts constant

`{code(source)}` with the mean output of {all_ - stay} of its {all_} routed experts in their place, chosen by `{code(kept["criterion"])}`.
The router is the source's. vLLM 0.33 and newer run this folder (`approximate_experts` in config.json), and so does moe-prism. Older
versions of vLLM load it and answer wrongly; transformers refuses it. `kept.json` lists the experts that stayed.

The outputs differ from the source's. `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""

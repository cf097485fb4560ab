"""The README.md of a model whose sub-experts are experts of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def resliced_card(facts: Mapping[str, Any], model_type: str) -> str:
    """Markdown."""
    source, found = facts["source"]["name"], facts["reslicing"]
    steps = [step for step in facts.get("recovery", ()) if step["method"] == "router"]
    what = (
        f"The router was then trained for {steps[-1]['steps']} steps ({shown(steps[-1]['loss'])}), so the outputs differ from the source's."
        if steps
        else f"With {found['experts_per_token']} experts per token the function is the source's."
    )
    return f"""{front_matter(facts, model_type)}
# {shown(source)}, sub-experts as experts

Every expert of `{code(source)}` as {found["n_sub"]} experts of {found["width"]} neurons: {found["experts"]} in a layer, and
{found["experts_per_token"]} per token. Router rows stand {found["n_sub"]} times, and output weights are multiplied by {found["factor"]}.
{what}
transformers, vLLM and other tools load this folder as a model of the same family.

`moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""

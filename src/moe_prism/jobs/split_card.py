"""The README.md of a split model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def split_card(facts: Mapping[str, Any]) -> str:
    """Markdown."""
    source, found = facts["source"]["name"], facts["result"]
    share = (found["shared_neurons"] + found["active"] * found["expert_neurons"]) / found["neurons"]
    always = f"{found['shared_neurons']} that always run and {found['experts']} experts of {found['expert_neurons']}"
    return f"""{front_matter(facts, "qwen2_moe")}
# {shown(source)} as a mixture of experts

`{code(source)}` with the {found["neurons"]} neurons of every MLP dealt to {always} (`{code(found["method"])}`). transformers and other
tools load this folder as a Qwen2-MoE model. `num_experts_per_tok` in `config.json` is {found["active"]}: a token runs {share:.0%} of the
neurons. With {found["experts"]} the outputs are the dense model's: the largest difference of a logit was
{found["all_on_difference"]:.1e} of the largest logit. The routers were fitted by ridge regression on calibration text. Nothing was trained.

Fewer experts change the outputs. `moe-prism frontier this-folder` measures how. `moe-prism verify this-folder` checks every file.
{terms_of(facts)}
"""

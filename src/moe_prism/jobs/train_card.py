"""The README.md of a model that was trained here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown


def train_card(facts: Mapping[str, Any], model_type: str) -> str:
    """Markdown. facts: of prism.json."""
    from huggingface_hub import ModelCardData

    recipe, found = facts["training"], facts["result"]
    shape = recipe["model"]
    head = ModelCardData(library_name="transformers", tags=["moe-prism", "mixture-of-experts", model_type]).to_yaml()
    own = "" if not model_type.startswith("prism_") else (
        "\n`import moe_prism.architectures.own` makes transformers know this class; every command of moe-prism does so by itself.\n"
    )  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in facts["inputs"]["settings"].items()) or "none"
    text = ", ".join(f"`{code(name)}`" for name in recipe["text"])
    return f"""---
{head}
---

# {shown(recipe["architecture"])}, trained by moe-prism

A mixture of experts with {found["parameters"] / 1e6:.2f} million parameters, of which {found["trained_parameters"] / 1e6:.2f} were trained:
{shape["layers"]} layers of hidden size {shape["hidden"]}, {shape["experts"]} experts of {shape["width"]} neurons, {shape["active"]} of them
per token. Settings of the architecture: {shown(settings)}.
{own}
It saw {found["tokens"]:,} tokens of {text} in {found["steps"]:,} steps, with seed {recipe["seed"]}. Its loss on held-out text of the same
source is {found["held_out_loss"]:.4f} nats per token. It is a model to study architectures with, and knows nothing else.

`training.json` holds the loss of every step, `prism.json` the recipe. `moe-prism verify this-folder` checks every file.
"""

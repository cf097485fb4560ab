"""The README.md of a model that was trained here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import code, shown
from .refactor_card import front_matter, terms_of


def train_card(facts: Mapping[str, Any], model_type: str) -> str:
    """Markdown. facts: of prism.json."""
    recipe, found = facts["training"], facts["result"]
    shape = found["shape"]
    started = "companions" in facts
    head = front_matter({"companions": {"licence": {}}, **facts}, model_type)
    own = "" if not model_type.startswith("prism_") else (
        "\n`import moe_prism.architectures.own` makes transformers know this class; every command of moe-prism does so by itself.\n"
    )  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in facts["inputs"]["settings"].items()) or "none"
    data = ", ".join(f"`{code(name)}`" for name in found["data"])
    return f"""{head}
# {shown(recipe["architecture"] or facts["source"]["name"])}, trained by moe-prism

A mixture of experts with {found["parameters"] / 1e6:.2f} million parameters, of which {found["trained_parameters"] / 1e6:.2f} were trained:
{shape["layers"]} layers of hidden size {shape["hidden"]}, {shape["experts"]} experts of {shape["width"]} neurons, {shape["active"]} of them
per token. Settings of the architecture: {shown(settings)}.
{own}{_begun(facts)}
It saw {found["tokens"]:,} positions of {data} in {found["steps"]:,} steps, with seed {recipe["seed"]}. Its loss on held-out
examples of the same source is {found["held_out_loss"]:.4f} ({found["unit"]}). It is a model to study architectures with, and knows nothing
else.

`training.json` holds the loss of every step, `prism.json` the recipe. `moe-prism verify this-folder` checks every file.
{terms_of(facts) if started else ""}
"""


def _begun(facts: Mapping[str, Any]) -> str:
    """What it began from, and whom it followed."""
    given, found = facts["inputs"], ""
    if "start" in given:
        found += f"Its training began with the weights of `{code(given['start']['name'])}`.\n"
    if "teacher" in given:
        found += f"It was also trained to say what `{code(given['teacher']['name'])}` says.\n"
    return found and "\n" + found

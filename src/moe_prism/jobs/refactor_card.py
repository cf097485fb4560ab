"""The README.md of a refactored model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..schema.read import one_line
from .card_text import MOST, code, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""What a hub can link to; the name of a folder on this machine is none."""
EXAMPLES = {"python": "def main(", "other": "The"}


def front_matter(facts: Mapping[str, Any], model_type: str, relation: str = "finetune") -> str:
    """What model hubs read of a model card, with the licence fields of the source's own card. relation: to the base model."""
    from huggingface_hub import ModelCardData

    name = facts["source"]["name"]
    base: dict[str, Any] = {"base_model": name, "base_model_relation": relation} if HUB_NAME.fullmatch(name) else {}
    terms: dict[str, Any] = {key: one_line(value.strip("'\""), MOST) for key, value in facts["companions"]["licence"].items()}
    data = ModelCardData(
        library_name="transformers", tags=["moe-prism", "mixture-of-experts", one_line(model_type, MOST)], **base, **terms
    )
    return f"---\n{data.to_yaml()}\n---\n"


def terms_of(facts: Mapping[str, Any]) -> str:
    """A sentence on the licence."""
    known = facts["companions"]["licence"]
    name = known.get("license_name") or known.get("license")
    return (
        f"The licence is the source model's: {shown(name)}."
        if name
        else "The licence is the source model's, whose card names none."
    )


def model_card(facts: Mapping[str, Any], model_type: str) -> str:
    """Markdown."""
    source, name = shown(facts["source"]["name"]), code(facts["source"]["name"])
    calibration, text = facts["calibration"], code(facts["calibration"]["text"])
    width = facts["layers"][0]["width"]
    plain, kept = facts.get("dequantized"), facts.get("kept_format")
    stored = f"They were {shown(plain['format'])} and are {plain['dtype']} here.\n" if plain else ""
    if kept and kept["requantized"]:
        again = f"{kept['requantized']} of {kept['weights']} matrices were quantized again, which costs a KL of {kept['kl']:.5f}"
        stored = f"Weights stay in {shown(kept['format'])}; {again}.\n"
    elif kept:
        stored = f"Weights stay in {shown(kept['format'])}, code by code.\n"
    relation = "quantized" if kept else "finetune"
    prompt = EXAMPLES["python" if calibration["text"] in ("stdlib", "domains/python") else "other"]
    return f"""{front_matter(facts, model_type, relation)}
# {source}, elastic

The weights of `{name}` with the neurons of every expert reordered, so that each expert is {facts["n_sub"]} contiguous sub-experts of
{width // facts["n_sub"]} neurons. The function is unchanged: transformers, vLLM and other tools load this folder as the original model.
{stored}`prism.json` and `prism.safetensors` make it elastic; without them it is the model it came from.

```python
import moe_prism

model, tokenizer = moe_prism.load("this-folder")
with moe_prism.operating_point(model, budget=0.5):  # half of the expert bytes, for whatever runs inside
    model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=40)
```

Calibrated on {calibration["tokens"]} tokens of `{text}`. `moe-prism frontier this-folder` measures what each price costs
in quality; `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""


def adopted_card(facts: Mapping[str, Any], model_type: str) -> str:
    """The same of a folder that `adopt` wrote."""
    source, adopted = facts["source"]["name"], facts["adopted"]
    title, name, tool = shown(source), code(source), shown(adopted["format"])
    return f"""{front_matter(facts, model_type, "quantized")}
# {title}, elastic and quantized

`{name}` with each expert cut into {facts["n_sub"]} contiguous sub-experts, then quantized by another tool ({tool}).
Its weights are as that tool wrote them. `prism.json` and `prism.safetensors` make it elastic.

At full budget its KL to the elastic model before quantization is {adopted["kl"]:.5f} nats per token, on {adopted["kl_tokens"]} tokens of
{adopted["kl_text"]} text. `moe-prism frontier this-folder` measures what each price costs. {terms_of(facts)}
"""

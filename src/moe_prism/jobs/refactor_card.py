"""The README.md of a refactored model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def front_matter(facts: Mapping[str, Any], model_type: str) -> str:
    """What model hubs read of a model card, with the licence fields of the source's own card."""
    terms = "".join(f"{key}: {value}\n" for key, value in facts["companions"]["licence"].items())
    return f"""---
library_name: transformers
base_model: {facts["source"]["name"]}
{terms}tags:
- moe-prism
- mixture-of-experts
- {model_type}
---
"""


def terms_of(facts: Mapping[str, Any]) -> str:
    """A sentence on the licence."""
    known = facts["companions"]["licence"]
    name = known.get("license_name") or known.get("license")
    return f"The licence is the source model's: {name}." if name else "The licence is the source model's, whose card names none."


def model_card(facts: Mapping[str, Any], model_type: str) -> str:
    """Markdown."""
    source = facts["source"]["name"]
    calibration = facts["calibration"]
    width = facts["layers"][0]["width"]
    plain, kept = facts.get("dequantized"), facts.get("kept_format")
    stored = f"They were {plain['format']} and are {plain['dtype']} here.\n" if plain else ""
    if kept and kept["requantized"]:
        again = f"{kept['requantized']} of {kept['weights']} matrices were quantized again, which costs a KL of {kept['kl']:.5f}"
        stored = f"Weights stay in {kept['format']}; {again}.\n"
    elif kept:
        stored = f"Weights stay in {kept['format']}, code by code.\n"
    return f"""{front_matter(facts, model_type)}
# {source}, elastic

The weights of `{source}` with the neurons of every expert reordered, so that each expert is {facts["n_sub"]} contiguous sub-experts of
{width // facts["n_sub"]} neurons. The function is unchanged: transformers, vLLM and other tools load this folder as the original model.
{stored}`prism.json` and `prism.safetensors` make it elastic; without them it is the model it came from.

```python
import moe_prism

model, tokenizer = moe_prism.load("this-folder")
with moe_prism.operating_point(model, budget=0.5):  # half of the expert bytes, for whatever runs inside
    model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40)
```

Calibrated on {calibration["tokens"]} tokens of `{calibration["text"]}`. `moe-prism frontier this-folder` measures what each price costs
in quality; `moe-prism verify this-folder` checks every file. {terms_of(facts)}
"""


def adopted_card(facts: Mapping[str, Any], model_type: str) -> str:
    """The same of a folder that `adopt` wrote."""
    source, adopted = facts["source"]["name"], facts["adopted"]
    return f"""{front_matter(facts, model_type)}
# {source}, elastic and quantized

`{source}` with each expert cut into {facts["n_sub"]} contiguous sub-experts, then quantized by another tool ({adopted["format"]}).
Its weights are as that tool wrote them. `prism.json` and `prism.safetensors` make it elastic.

At full budget its KL to the elastic model before quantization is {adopted["kl"]:.5f} nats per token, on {adopted["kl_tokens"]} tokens of
{adopted["kl_text"]} text. `moe-prism frontier this-folder` measures what each price costs. {terms_of(facts)}
"""

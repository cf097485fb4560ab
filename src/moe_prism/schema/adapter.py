"""adapter.json: what a fine-tune of some experts holds, and which model it belongs to."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import MaxLen, MinLen
from pydantic import Field, model_validator

from .common import MOST_EXPERTS, MOST_LAYERS, Experts, Form, Name, Positive, Sha256

AGAIN = "make it again with `moe-prism adapter`"


class PackedForm(Form):
    """How differences to the base are stored: the settings of the codec `compeft`."""

    codec: Literal["compeft"]
    keep: Annotated[float, Field(gt=0, le=1)]
    size: Annotated[float, Field(ge=0, le=100)]


class AdapterForm(Form):
    """base: digest of the model's weights; tensors: sha256 of adapter.safetensors; layers: per MoE layer the experts that were tuned.

    packed: null where whole weights are stored.
    """

    kind: Literal["adapter"]
    version: Literal[1]
    name: Name
    base: Sha256
    tensors: Sha256
    experts: Experts
    hidden: Positive
    width: Positive
    gated: bool
    packed: PackedForm | None
    layers: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MaxLen(MOST_EXPERTS)]], MinLen(1), MaxLen(MOST_LAYERS)
    ]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for layer, own in enumerate(self.layers):
            if own != sorted(set(own)):
                raise ValueError(f"the experts of layer {layer} must rise, each once")
            if own and own[-1] >= self.experts:
                raise ValueError(f"layer {layer} names expert {own[-1]} of {self.experts}")
        return self

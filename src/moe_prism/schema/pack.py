"""The head of `experts.pack`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import MaxLen
from pydantic import Discriminator, Field, Tag, model_validator

from .common import MOST_FILES, MOST_LAYERS, Blocks, Experts, Form, InnerName, Sha256

Offset = Annotated[int, Field(ge=0, lt=1 << 52)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]


class LayoutForm(Form):
    """`RecordLayout`."""

    hidden: Size
    block: Size
    has_gate: bool
    has_bias: bool
    dtype: Literal["bfloat16", "float16", "float32"]


class PlaneLayoutForm(Form):
    """`PlaneLayout`."""

    hidden: Size
    block: Size
    has_gate: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    base: Annotated[int, Field(ge=1, le=4)]
    bits: Annotated[int, Field(ge=5, le=8)]
    group: Annotated[int, Field(ge=8, le=1 << 12, multiple_of=8)]

    @model_validator(mode="after")
    def whole(self) -> Self:
        """Products read whole tiles and groups."""
        if self.hidden % self.group or self.block % self.group or self.hidden % 16 or self.block % 16:
            raise ValueError(f"blocks of {self.block} and {self.hidden} inputs are no whole groups of {self.group}")
        return self


def _kind(value: Any) -> str:
    group = value.get("group") if isinstance(value, dict) else getattr(value, "group", None)
    return "records" if group is None else "planes"


AnyLayout = Annotated[Annotated[LayoutForm, Tag("records")] | Annotated[PlaneLayoutForm, Tag("planes")], Discriminator(_kind)]


class PackForm(Form):
    """Where everything of the file lies."""

    format: Literal[1]
    source: Annotated[dict[InnerName, Sha256], MaxLen(MOST_FILES)]
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    experts: Experts
    parts: Blocks
    layout: AnyLayout
    sums_at: Offset
    blob_at: Offset
    blob: Annotated[int, Field(ge=0, lt=1 << 40)]
    start: Offset
    low_start: Offset
    small: Sha256

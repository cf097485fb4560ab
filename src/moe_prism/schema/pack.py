"""The head of `experts.pack`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen
from pydantic import Field

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


class PackForm(Form):
    """Where everything of the file lies."""

    format: Literal[1]
    source: Annotated[dict[InnerName, Sha256], MaxLen(MOST_FILES)]
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    experts: Experts
    parts: Blocks
    layout: LayoutForm
    sums_at: Offset
    blob_at: Offset
    blob: Annotated[int, Field(ge=0, lt=1 << 40)]
    start: Offset
    low_start: Offset
    small: Sha256

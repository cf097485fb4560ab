"""The file of patterns: which experts each task needs."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field

from .common import MOST_EXPERTS, MOST_LAYERS, Form, Name

AGAIN = "make it again with `moe-prism patterns`"
Encoded = Annotated[str, MaxLen(1 << 20)]


class PatternsForm(Form):
    """Of every task the scores of all experts, layer by layer, as base64."""

    kind: Literal["patterns"]
    experts: Annotated[list[Annotated[int, Field(ge=1, le=MOST_EXPERTS)]], MinLen(1), MaxLen(MOST_LAYERS)]
    least: Annotated[float, Field(ge=0, le=1)]
    tasks: Annotated[dict[Name, Annotated[list[Encoded], MaxLen(MOST_LAYERS)]], MinLen(1), MaxLen(256)]

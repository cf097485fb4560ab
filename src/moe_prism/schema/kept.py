"""`kept.json` of a pruned folder."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field

from .common import MOST_EXPERTS, MOST_LAYERS, Budget, Count, Form, Name, Share
from .points import KeptForm

AGAIN = "write it again with `moe-prism prune --report-only`"


class KeptLayerForm(KeptForm):
    """The experts of one layer that stay."""

    layer: Count | None = None
    name: Name | None = None


class SelectionForm(Form):
    """The whole file; the layers are enough. `folder`, `left_out` and memory are what `prune --json` adds."""

    criterion: Name | None = None
    form: Literal["removed", "constant"] = "removed"
    keep: Budget | None = None
    allocation: Name | None = None
    protected: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MaxLen(MOST_EXPERTS)]], MaxLen(MOST_LAYERS)
    ] = []
    domains: Annotated[list[Name], MaxLen(256)] = []
    least_tokens: Count | None = None
    resident_share: Share | None = None
    layers: Annotated[list[KeptLayerForm], MinLen(1), MaxLen(MOST_LAYERS)]
    folder: str | None = None
    left_out: dict[str, str] = {}
    peak_rss_bytes: Count | None = None

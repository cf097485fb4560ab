"""Files of other tools: what of them is looked at, and within which bounds."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen
from pydantic import ConfigDict

from .common import Form
from .read import Bounds

CONFIG_BOUNDS = Bounds(bytes=4 << 20, depth=16, values=400_000, keys=10_000)
INDEX_BOUNDS = Bounds(bytes=256 << 20, depth=4, values=8_000_000, keys=2_000_000)


class IndexForm(Form):
    """`model.safetensors.index.json`: which shard holds a tensor."""

    model_config = ConfigDict(extra="ignore")

    weight_map: Annotated[dict[str, str], MinLen(1)]

"""How often each expert of each layer is used, as a picture and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import chart

COLUMNS = 128  # of the picture at most: beyond, neighbours share one

Shares = Sequence[Sequence[float]]
"""[L][E]: of a layer's choices, the share of each expert."""


def cells(shares: Shares) -> list[dict[str, Any]]:
    """One row per square: layer, the first and last expert in it, and their mean share as a multiple of an even one."""
    found = []
    for layer, own in enumerate(shares):
        step = math.ceil(len(own) / COLUMNS)
        for first in range(0, len(own), step):
            part = own[first : first + step]
            times = sum(part) / len(part) * len(own)
            found.append({"layer": layer, "expert": first, "last": first + len(part) - 1, "times": times})
    return found


def by_layer(shares: Shares) -> list[dict[str, Any]]:
    """layer, its busiest expert and that one's share, experts that nobody chose, and how many equally used ones would be as uneven.

    The last is exp of the entropy of the shares.
    """
    found = []
    for layer, own in enumerate(shares):
        busiest = max(range(len(own)), key=own.__getitem__)
        spread = math.exp(-sum(share * math.log(share) for share in own if share > 0))
        row = {"layer": layer, "busiest": busiest, "share": own[busiest], "unused": sum(share == 0 for share in own)}
        found.append({**row, "as_many_as": spread})
    return found


def draw(shares: Shares, width: int) -> Any:
    """Squares of layers (down) and experts (across); darker is used more."""
    alt = chart.libraries()
    layers = len(shares)
    return (
        alt.Chart(alt.Data(values=cells(shares)))
        .mark_rect()
        .encode(
            x=alt.X("expert:O", title="expert").axis(labelOverlap=True, ticks=False, grid=False),
            y=alt.Y("layer:O", title="layer").axis(labelOverlap=True, ticks=False, grid=False),
            color=alt.Color("times:Q", title="times an even share", scale=alt.Scale(scheme="viridis", reverse=True)),
        )
        .properties(width=width, height=max(60, min(600, 16 * layers)), background="white")
        .configure_axis(**chart.AXIS)
        .configure_view(strokeWidth=0)
    )

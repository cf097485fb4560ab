"""In which order to load what a layer needs: hottest expert, lowest bit plane first (D2MoE, arXiv 2504.15299). `orders.py` measures it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_prism.errors import UsageError

Job = tuple[int, int]
"""(expert, bit plane): plane b of an expert can be used once planes 0..b are loaded. Whole experts are plane 0 alone."""


def hottest_first(uses: Sequence[Sequence[int]]) -> list[Job]:
    """The loads in order; uses[expert][plane]: how many tokens use that plane.

    One queue of planes per expert, ascending; of the heads the one with the most uses is loaded next (ties: the lower expert).
    Planes that nobody uses are not loaded.
    """
    heads = [0] * len(uses)
    order: list[Job] = []
    while True:
        open_ = [e for e, plane in enumerate(heads) if plane < len(uses[e]) and uses[e][plane] > 0]
        if not open_:
            return order
        expert = max(open_, key=lambda e: (uses[e][heads[e]], -e))
        order.append((expert, heads[expert]))
        heads[expert] += 1


def by_number(uses: Sequence[Sequence[int]]) -> list[Job]:
    """The same loads by expert number, plane by plane: the baseline."""
    return [(e, plane) for e, planes in enumerate(uses) for plane, count in enumerate(planes) if count > 0]


def makespan(order: Sequence[Job], uses: Sequence[Sequence[int]], load: Sequence[float], compute: Sequence[float]) -> float:
    """When the last computation ends: loads one after another, the work on a plane (uses x compute[plane]) after its load, in order.

    load, compute: seconds per plane, and per use of a plane. UsageError if a plane comes before a lower one of its expert.
    """
    loaded: dict[int, int] = {}
    read = done = 0.0
    for expert, plane in order:
        if loaded.get(expert, -1) != plane - 1:
            raise UsageError(f"plane {plane} of expert {expert} is out of order", "load the planes of an expert from 0 upwards")
        loaded[expert] = plane
        read += load[plane]
        done = max(done, read) + uses[expert][plane] * compute[plane]
    return done

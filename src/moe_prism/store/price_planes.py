"""What reading planes costs, and which planes the steps of a text ask for."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..offload.replay import Group
from .plane_layout import PlaneLayout
from .plane_store import PlaneStore
from .plane_wanted import PlaneWanted
from .price_reads import COUNTS, REPEATS, ReadPrices
from .wanted import Wanted


def measure_plane_prices(store: PlaneStore, *, seed: int = 0) -> ReadPrices:
    """Time requests of n absent planes against the same requests when they are there; medians of REPEATS."""
    draw, space = random.Random(seed), store.space  # noqa: S311 - which planes are timed
    counts, seconds = [], []
    for count in [n for n in COUNTS if 2 <= n <= min(store.capacity(0), space.experts * space.parts)]:
        found = []
        for _ in range(REPEATS + 1):
            layer = draw.randrange(space.layers)
            absent = np.flatnonzero(~store.resident(layer).reshape(-1, 2).any(1)).tolist()
            if 2 * len(absent) < count:
                break
            blocks = draw.sample(absent, count // 2)
            cold, warm = (_request(store, layer, blocks) for _ in range(2))
            found.append(cold - warm)
        if len(found) > 1:
            counts.append(count)
            seconds.append(max(1e-7, statistics.median(found[1:])))
    return ReadPrices(counts, list(np.maximum.accumulate(seconds))) if counts else ReadPrices([1], [0.0])


def _request(store: PlaneStore, layer: int, blocks: list[int]) -> float:
    """Seconds of one token's request for both planes of these blocks."""
    layout, parts = store.pack.layout, store.space.parts // 2
    assert isinstance(layout, PlaneLayout)
    experts = sorted({block // parts for block in blocks})
    widths = torch.zeros(1, len(experts), parts)
    for block in blocks:
        widths[0, experts.index(block // parts), block % parts] = layout.bits
    x, weight = torch.randn(1, layout.hidden), torch.ones(1, len(experts))
    wanted = PlaneWanted.of(torch.tensor([experts]), weight, widths, store.space.experts)
    began = time.perf_counter()
    store.run(layer, x, wanted)
    return time.perf_counter() - began


class AskedPlanes:
    """The groups of steps, as a replay takes them. prompts: which steps are some; slots: kept in every layer of a decode step."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.prompts: list[int] = []
        self.slots: list[int] = []
        self._step = -1

    def note(self, layer: int, tokens: int, wanted: Wanted, slots: int) -> None:
        """A layer of a step asks for records. slots: 0 for all but its first request."""
        if layer == 0 and slots:
            self._step += 1
            if tokens > 1:
                self.prompts.append(self._step)
        keys, weights = wanted.by_importance(0, len(wanted))
        self.groups.append(Group(self._step, layer, keys, weights, self._step, self._step + 1, False))
        if tokens == 1 and slots:
            self.slots.append(slots)


@contextmanager
def asked_planes(store: PlaneStore) -> Iterator[AskedPlanes]:
    """What steps ask for inside the block."""
    found = AskedPlanes()
    store.heard = found.note
    try:
        yield found
    finally:
        store.heard = None

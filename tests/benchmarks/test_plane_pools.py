"""Two pools for two precisions, replayed: each plane has its own slots, and the part is chosen on calibration text."""

from __future__ import annotations

import pytest

from moe_prism.offload.base import KeySpace
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.replay import Group
from moe_prism.store.pools import Eviction
from moe_prism.store.price_planes import AskedPlanes

SPACE = KeySpace(1, 4, 2, planes=2)
LRU = Eviction(cache_policies.get("lru"))


@pytest.fixture
def script_pools(script):
    return script("plane_pools")


def asked(steps):
    """Steps that ask for these (expert, plane)."""
    found = AskedPlanes()
    found.groups = [
        Group(step, 0, [2 * expert + plane for expert, plane in keys], [1.0] * len(keys), step, step + 1, False)
        for step, keys in enumerate(steps)
    ]
    found.prompts = [0, 1]
    return found


def test_each_plane_has_its_own_slots(script_pools):
    """Upper planes of three experts come round while lower ones pass by, each once."""
    text = asked([[(0, 0)], [(0, 0)], *([(step % 3, 0), (step % 4, 1)] for step in range(24))])
    assert script_pools.of_plane(text.groups, 1)[4].keys == [2]
    one = script_pools.reads(text, SPACE, 4, LRU)
    two = script_pools.apart(text, SPACE, 4, 0.75, LRU)
    assert two < one  # three upper planes stay, and lower ones would miss in any case
    assert script_pools.apart(text, SPACE, 4, 0.5, LRU) > two
    row = script_pools.compare({"calibration": text, "evaluation": text}, SPACE, 4, "lru", 1)
    assert row["upper_part"] in (0.7, 0.8) and row["two_pools"] == two and row["one_pool"] == one

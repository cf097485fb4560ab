"""Memory behind a layer's experts: taken where something is written, and given back."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_prism.adapters.room import Reserved, RoomyLayer, reserve
from moe_prism.errors import UsageError
from moe_prism.model import find_layers, load_model


def resident(address, size):
    """Bytes of a range that are in memory, as the system says."""
    page, total = mmap.PAGESIZE, 0
    with Path("/proc/self/pagemap").open("rb") as file:
        for begin in range(address // page * page, address + size, page):
            file.seek(begin // page * 8)
            total += page * (int.from_bytes(file.read(8), "little") >> 63)
    return total


@pytest.mark.parametrize("swapped", [False, True])
def test_a_parameter_keeps_its_values_and_order_and_room_takes_no_memory_before_it_is_used(swapped):
    parameter = nn.Parameter(torch.randn(3, 64, 128), requires_grad=False)
    if swapped:
        parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    before, strides = parameter.data.clone(), parameter.stride()
    made = Reserved.behind(parameter, 5)
    assert torch.equal(parameter, before) and parameter.stride() == strides and made.whole.shape == (8, 64, 128)
    size = 64 * 128 * 4
    behind = made.whole.data_ptr() + 3 * size
    assert resident(behind, 5 * size) == 0
    made.whole[4] = 1.0
    assert resident(behind, 5 * size) == size
    made.release(4)
    assert resident(behind, 5 * size) == 0 and not made.whole[4].any() and torch.equal(parameter, before)


def test_a_layer_with_room_has_the_same_views_and_more_experts(tiny_source):
    layer = find_layers(load_model(tiny_source))[0]
    before = [view.detach().clone() for view in (layer.gate, layer.up, layer.down)]
    roomy = RoomyLayer(layer, reserve(layer, 2))
    assert roomy.num_experts == layer.num_experts + 2 and layer.up.shape[0] == layer.num_experts
    with torch.no_grad():
        roomy.copy_expert(1, 5)
    for own, now, old in zip(roomy.matrices(5), (layer.gate, layer.up, layer.down), before, strict=True):
        assert torch.equal(now, old) and torch.equal(own, old[1])


def test_experts_that_do_not_lie_one_behind_the_other_are_refused(tiny_dense):
    layer = find_layers(load_model(tiny_dense))[0]
    with pytest.raises(UsageError, match="do not lie one behind the other"):
        reserve(layer, 2)

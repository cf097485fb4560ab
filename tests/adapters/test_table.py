"""Which slot an expert of an adapter is in, and which experts a fine-tune changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.adapters.choose import choose_experts
from moe_prism.adapters.table import BASE, AdapterTable, fragmentation
from moe_prism.errors import UsageError


def test_the_papers_example_maps_three_experts_and_no_other():
    table = AdapterTable(64, 8, 2)
    assert table.add(0, [3, 14, 47]) == [64, 65, 66]
    ids = torch.arange(64)[None]
    mapped = table.slots(ids, 0)
    assert mapped[0, [3, 14, 47]].tolist() == [64, 65, 66]
    others = [e for e in range(64) if e not in (3, 14, 47)]
    assert torch.equal(mapped[:, others], ids[:, others]) and torch.equal(table.slots(ids, BASE), ids)
    assert table.add(1, [0]) == [67] and table.slots(torch.tensor([[0, 3]]), 1).tolist() == [[67, 3]]


def test_ids_that_are_no_expert_stay_none():
    table = AdapterTable(4, 4, 1)
    table.add(0, [0, 3])
    assert table.slots(torch.tensor([[-1, 4, 3]]), 0).tolist() == [[-1, -1, 5]]
    assert table.slots(torch.tensor([[-1, 9, 3]]), BASE).tolist() == [[-1, -1, 3]]


@given(st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=3, max_size=3), st.integers(0, 2), st.randoms())
def test_a_batch_is_remapped_token_by_token_and_a_leaving_adapter_moves_nobody(tuned, leaves, random):
    table = AdapterTable(8, 12, 3)
    for adapter, own in enumerate(tuned):
        table.add(adapter, sorted(own))
    index = torch.tensor([[random.randrange(8) for _ in range(3)] for _ in range(6)])
    which = torch.tensor([random.choice([-1, 0, 1, 2]) for _ in range(6)])
    together = table.slots(index, which)
    for t in range(6):
        alone = table.slots(index[t : t + 1], int(which[t]))
        assert torch.equal(alone[0], together[t])
        for e, slot in zip(index[t].tolist(), alone[0].tolist(), strict=True):
            assert (slot >= 8) == (which[t] >= 0 and e in tuned[which[t]])
    held = {slot for adapter in range(3) for slot in table.slots(torch.arange(8)[None], adapter)[0].tolist() if slot >= 8}
    assert len(held) == sum(map(len, tuned)) and table.free == 12 - len(held)
    table.remove(leaves)
    stay = which != leaves
    assert torch.equal(table.slots(index, which)[stay], together[stay])
    assert torch.equal(table.slots(index, leaves), index) and table.free == 12 - len(held) + len(tuned[leaves])


def test_padding_takes_as_many_slots_as_the_formula_says():
    assert fragmentation(64, [[13] * 26, [1] * 26]) == pytest.approx((64 + 2 * 13) / (64 + 14))
    assert fragmentation(8, [[2, 2]]) == 1


def test_the_fewest_experts_that_hold_the_share_are_chosen_layer_by_layer():
    counts = [
        {"count": torch.tensor([1, 5, 3, 1]), "weight_sum": torch.tensor([4.0, 1.0, 1.0, 4.0])},
        {"count": torch.tensor([100, 0, 0, 900]), "weight_sum": torch.tensor([9.0, 0.5, 0.5, 0.0])},
    ]
    assert choose_experts(counts, 0.5, "tokens") == [[1], [3]]
    assert choose_experts(counts, 0.8, "tokens") == [[1, 2], [3]]
    assert choose_experts(counts, 0.4) == [[0], [0]]  # equal ones in the order of ids
    assert choose_experts(counts, 1.0, "tokens") == [[0, 1, 2, 3], [0, 3]]
    with pytest.raises(UsageError, match="outside"):
        choose_experts(counts, 0)
    with pytest.raises(UsageError, match="no token"):
        choose_experts([{"count": torch.zeros(2), "weight_sum": torch.zeros(2)}], 0.5)

"""Selection in one pass against the same rules as tensor operations."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, Slots, base
from moe_prism.elastic.rules import rules
from moe_prism.elastic.rules import threshold as threshold_module
from moe_prism.elastic.rules import top_slots as product_module
from moe_prism.elastic.rules.threshold import QUANTILES
from moe_prism.model import find_layers
from tests.parity.families import build

PLAN = LayerParts(find_layers(build("olmoe"))[0], 4, 0, {"cutoffs": torch.linspace(0.9, 0.0, QUANTILES)})


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    k=st.integers(1, 4),
    n=st.integers(1, 5),
    rule=st.sampled_from(["product", "threshold"]),
)
@settings(max_examples=60, deadline=None)
def test_one_pass_equals_the_tensor_form(seed, tokens, k, n, rule):
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(tokens, k, generator=g) - 0.2
    norms = (torch.rand(tokens, k, n, generator=g) * 6).round() / 4  # with ties
    valid = torch.rand(tokens, k, generator=g) < 0.8
    valid[:, 0] = True

    def slots():
        return Slots(torch.zeros(tokens, 2), torch.zeros(tokens, k, dtype=torch.long), weight, valid, n, lambda: norms)

    budget = torch.rand(tokens, generator=g).clamp(min=0.01)
    budget[0] = 1.0
    made = rules.get(rule)(PLAN)
    one_pass = made.keep(slots(), budget)
    modules = (base, product_module, threshold_module)
    before = [m.is_compiled for m in modules]
    try:
        for m in modules:
            m.is_compiled = lambda *_: False
        assert torch.equal(made.keep(slots(), budget), one_pass)
    finally:
        for m, function in zip(modules, before, strict=True):
            m.is_compiled = function

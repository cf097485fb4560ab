"""The cache by either of its names."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from moe_prism.cache_names import cache_argument, given_cache, made_cache
from tests.parity.families import build


class Newer(nn.Module):
    def forward(self, input_ids, cache=None):
        return {"cache": cache}


class Older(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return {"past_key_values": past_key_values}


@pytest.mark.parametrize("model", [Newer(), Older()], ids=lambda model: type(model).__name__)
def test_a_cache_goes_in_and_comes_out_by_the_name_that_the_model_has(model):
    mine = DynamicCache()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs, named: seen.append(given_cache(named)), with_kwargs=True)
    assert made_cache(model(None, **cache_argument(model, mine))) is mine and seen == [mine]
    assert made_cache((torch.zeros(1),)) is None and given_cache({}) is None
    assert given_cache({"cache": object()}) is None  # of other requests at every step: nothing goes on in it


def test_a_family_of_transformers_keeps_what_it_is_given():
    model = build("olmoe").eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        kept = made_cache(model(input_ids=ids[:, :4], use_cache=True))
        parts = model(input_ids=ids[:, 4:], use_cache=True, **cache_argument(model, kept)).logits
        torch.testing.assert_close(parts, model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=1e-5)

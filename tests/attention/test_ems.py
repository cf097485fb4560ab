"""The bounded cache: exact while it holds everything, never over its size, and merging beside evicting alone."""

import pytest
import torch

import moe_prism
from moe_prism.attention.ems import EmsCache, EmsLayer, EmsSettings, attending
from moe_prism.errors import UsageError
from moe_prism.jobs.generate import generate
from moe_prism.options.generate import GenerateOptions

TEXT = (
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self):\n"
)


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return moe_prism.load(elastic_nano)


def logits(model, ids, settings, chunk):
    """[t, V] of ids [t], read in chunks behind each other."""
    cache = EmsCache(model.config.num_hidden_layers, settings)
    rows = []
    with torch.no_grad(), attending(model, cache):
        for start in range(0, len(ids), chunk):
            rows.append(model(input_ids=ids[None, start : start + chunk], past_key_values=cache, use_cache=True).logits[0])
            assert all(layer.keys.shape[2] <= settings.entries for layer in cache.layers)
    return torch.cat(rows), cache


@pytest.fixture(scope="module")
def ids(nano):
    return torch.tensor(nano[1](TEXT * 3)["input_ids"])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_cache_that_holds_everything_changes_nothing(nano, ids, chunk):
    model = nano[0]
    with torch.no_grad():
        plain = model(input_ids=ids[None]).logits[0]
    found, cache = logits(model, ids, EmsSettings(entries=len(ids)), chunk)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(-1), plain.argmax(-1)) and cache.get_seq_length() == len(ids)


def test_generate_gives_the_same_tokens_with_room_and_others_without(nano):
    plain = generate(*nano, TEXT, sampling=GenerateOptions(max_tokens=24)).text
    assert generate(*nano, TEXT, sampling=GenerateOptions(max_tokens=24, kv_entries=400)).text == plain
    few = generate(*nano, TEXT, sampling=GenerateOptions(max_tokens=24, kv_entries=4))
    assert few.text != plain and few.tokens == 24
    assert generate(*nano, TEXT, sampling=GenerateOptions(max_tokens=24)).text == plain  # the model is as it was


def test_bytes_stay_where_they_are(nano, ids):
    _, cache = logits(nano[0], ids, EmsSettings(entries=32), 8)
    layers, heads, size = 6, 4, 32
    assert cache.bytes == layers * 2 * heads * 32 * size * 4


def test_what_is_evicted_is_what_was_looked_at_least():
    layer = EmsLayer(EmsSettings(entries=3, alike=2.0))
    keys, values = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    layer.update(keys, values)
    attention = torch.tensor([[[0.1, 0.5, 0.3, 0.1]], [[0.4, 0.05, 0.25, 0.3]]])
    layer.queries, layer.received = torch.zeros(2, 4), torch.zeros(2, 4)
    layer.observe(attention.expand(2, 1, 4))
    assert torch.equal(layer.keys[0, 1], keys[0, 1, [0, 2, 3]])
    assert layer.keys.shape[2] == 3 and layer.get_seq_length() == 4


def test_merging_is_a_weighted_mean_of_what_is_alike():
    layer = EmsLayer(EmsSettings(entries=2, alike=0.9))
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]]])
    values = torch.tensor([[[[2.0, 0.0], [5.0, 5.0], [4.0, 2.0]]]])
    layer.update(keys, values)
    layer.observe(torch.tensor([[[0.2, 0.7, 0.1]]]))
    assert layer.tokens.tolist() == [[2.0, 1.0]]
    torch.testing.assert_close(layer.keys[0, 0], torch.tensor([[1.0, 0.05], [0.0, 1.0]]))
    torch.testing.assert_close(layer.values[0, 0], torch.tensor([[3.0, 1.0], [5.0, 5.0]]))
    layer.update(torch.tensor([[[[-1.0, 0.0]]]]), torch.ones(1, 1, 1, 2))
    layer.observe(torch.tensor([[[0.5, 0.45, 0.05]]]))
    assert layer.tokens.tolist() == [[2.0, 1.0]]  # nothing points its way: it is dropped


def test_what_cannot_be_bounded_is_refused(nano):
    with pytest.raises(UsageError, match="0 entries"):
        EmsCache(2, EmsSettings(entries=0))
    cache = EmsCache(6)
    with attending(nano[0], cache), pytest.raises(UsageError, match="2 sequences"):
        nano[0](input_ids=torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)
    nano[0].config.sliding_window = 8
    try:
        with pytest.raises(UsageError, match="does not see every token"), attending(nano[0], cache):
            pass
    finally:
        del nano[0].config.sliding_window

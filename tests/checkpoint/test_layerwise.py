"""Forwards in step: the model's own logits, one layer in memory, and errors that end all of them."""

import threading

import pytest
import torch

from moe_prism.checkpoint import LayerStream
from moe_prism.checkpoint.layerwise import THREAD, run_layerwise
from tests.tiny_sources import save_tiny

IDS = torch.randint(0, 200, (5, 2, 16), generator=torch.Generator().manual_seed(0))


def waiting():
    """Threads of forwards that are still there. Libraries have threads of their own that come when they want."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama"])
def test_every_forward_gives_the_models_logits(family, tmp_path):
    whole = save_tiny(family, tmp_path)
    stream, found, seen = LayerStream(tmp_path, torch.float32), {}, []

    def forward(i):
        return lambda model: found.update({i: model(input_ids=IDS[i], use_cache=False).logits})

    def visit(name, go):
        seen.append(name)
        others = [other for other in stream.layer_names() if other != name]
        assert all(p.is_meta for other in others for p in stream.model.get_submodule(other).parameters())
        for i in range(len(IDS)):
            go(i)

    run_layerwise(stream, [forward(i) for i in range(len(IDS))], visit)
    assert seen == stream.layer_names() and stream.resident_bytes() == 0 and not waiting()
    for i, ids in enumerate(IDS):
        assert torch.equal(found[i], whole(input_ids=ids, use_cache=False).logits)


def test_an_error_of_one_ends_all(tmp_path):
    save_tiny("olmoe", tmp_path)
    stream = LayerStream(tmp_path, torch.float32)

    def forward(model):
        return model(input_ids=IDS[0], use_cache=False)

    def wrong(_model):
        raise ValueError("wrong")

    def visit(_name, go):
        go(0)

    def late(_name, go):
        go(0)
        raise KeyError("late")

    for forwards, way, error in (
        ([forward, wrong], visit, ValueError),
        ([forward], late, KeyError),
        ([forward] * 2, visit, RuntimeError),
    ):
        with pytest.raises(error):
            run_layerwise(stream, forwards, way)
        assert stream.resident_bytes() == 0 and not waiting()

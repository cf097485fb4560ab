"""Products from planes of four bits against the reference over weights that are written out: every width, any mixture of slots."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.elastic import attach
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.coded import CodedLayer
from moe_prism.elastic.execute import triton_run
from moe_prism.elastic.execute.from_planes import from_planes
from moe_prism.elastic.execute.plain import reference
from moe_prism.elastic.planes import PackedPlanes
from moe_prism.elastic.scorers import scorers
from moe_prism.kernels import threads
from moe_prism.kernels.plane_tiles import AVAILABLE
from moe_prism.model import find_layers
from moe_prism.point import FULL, SlotBits, SlotRule
from tests.elastic.common import computed
from tests.elastic.test_triton import batch, make, needs_triton

WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
CLOSE = 2e-4  # of the output's size: inputs are rounded to 16 bits, before both products
needs_bytes = pytest.mark.skipif(not AVAILABLE, reason="no instructions that multiply bytes")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make` puts its layer on the GPU")


def slot_bits(widths=WIDTHS, group=32):
    errors = tuple(0.3 / 4**i for i in range(len(widths)))
    return SlotBits(widths=widths, errors=(errors,), group=group, choosing=4.0)


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Nested(base=base), bits) for base, bits in ((1, 8), (2, 8), (2, 4), (4, 8), (3, 6))] + [(Rtn(), b) for b in range(1, 9)],
)
@pytest.mark.parametrize("group", [32, 64])
def test_tiles_hold_what_a_codec_stored(codec, bits, group):
    matrix = torch.randn(2, 3, 32, 128, generator=torch.Generator().manual_seed(bits))
    packed = PackedPlanes.encoded(codec, matrix, bits, group)
    planes = codec.encode(matrix, bits, group)
    for width in planes.widths:
        assert torch.equal(packed.decoded(int(width)), codec.decode(planes, width))
    assert packed.tiles.shape[-1] == packed.scales + packed.plane * (1 + (bits > 4))
    assert packed.tiles.numel() == codec.bytes(matrix.shape, bits if bits in (4, 8) else 8 if bits > 4 else 4, group)


def test_other_planes_are_left_to_their_codec():
    matrix = torch.randn(1, 1, 32, 96, generator=torch.Generator().manual_seed(0))
    for codec in (Nested(own_sizes=True), Nested(symmetric=False), Rtn(symmetric=False)):
        assert PackedPlanes.encoded(codec, matrix, 4, 32) is None
    assert PackedPlanes.encoded(Rtn(), matrix, 4, 64) is None  # a group that is not full
    assert PackedPlanes.encoded(Rtn(), matrix[:, :, :20], 4, 32) is None  # outputs that fill no tile


@pytest.fixture(scope="module", params=[(3, 64, 32, 2), (4, 96, 64, 3), (2, 256, 128, 1)])
def coded(request):
    return CodedLayer(make(*request.param, gates=1), slot_bits())


@needs_bytes
@torch.no_grad()
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), share=st.floats(0, 1), bits=st.sampled_from(WIDTHS))
@settings(max_examples=40, deadline=None)
def test_a_layer_with_dropped_blocks(coded, seed, tokens, share, bits):
    x, index, weight, keep = batch(coded.parts, tokens, 2, share, seed)
    found = from_planes(coded.parts.layer, coded.packed, int(bits), (x, index, weight, keep))
    assert apart(found, reference(coded.at(bits), x, index, weight, keep)) < CLOSE


@needs_bytes
@torch.no_grad()
def test_a_token_does_not_see_its_neighbours_or_threads(coded, monkeypatch):
    x, index, weight, keep = batch(coded.parts, 50, 2, 0.7)
    asked = coded.parts.layer, coded.packed, 8
    together = from_planes(*asked, (x, index, weight, keep))
    for rows in (slice(0, 1), slice(7, 12)):
        assert torch.equal(from_planes(*asked, (x[rows], index[rows], weight[rows], keep[rows])), together[rows])
    monkeypatch.setattr(threads, "ONE_THREAD_WORK", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(from_planes(*asked, (x, index, weight, keep)), together)
    finally:
        torch.set_num_threads(before)


@needs_bytes
@torch.no_grad()
def test_corners(coded):
    """Values that are not finite come out as such, rows of nothing as nothing; an expert twice is left to others."""
    x, index, weight, keep = batch(coded.parts, 6, 2, 1.1)
    asked = coded.parts.layer, coded.packed, 4
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    found = from_planes(*asked, (x, index, weight, keep))
    assert (found[0] == 0).all() and found[1:3].isnan().all() and found[3:].isfinite().all()
    index[3, 1] = index[3, 0]
    assert from_planes(*asked, (x, index, weight, keep)) is None
    assert from_planes(*asked, (x.double(), index, weight, keep)) is None


@torch.no_grad()
def test_slots_are_chosen_by_gate_neurons_alone(coded):
    g, parts = torch.Generator().manual_seed(0), coded.parts
    ridge = 0.1 * torch.randn(parts.layer.num_experts, parts.n_sub, parts.layer.hidden + parts.n_sub + 1, generator=g)
    few, whole = (replace(own, tensors={"ridge": ridge}) for own in (coded.choosing(4.0), coded.at(4.0)))
    assert few.layer.up.shape[1] == parts.n_sub
    for tokens in (1, 5, 60):
        x, index, _, _ = batch(parts, tokens, 2, 1, tokens)
        torch.testing.assert_close(
            scorers.get("ridge")(few)(x, index), scorers.get("ridge")(whole)(x, index), rtol=1e-4, atol=1e-6
        )


@needs_bytes
@torch.no_grad()
def test_an_elastic_layer_runs_from_planes():
    """At a point of `bits` nothing is written out but gate neurons, and outputs are those of the reference."""
    parts = make(4, 64, 32, 4, gates=1)
    holder = torch.nn.Module()
    holder.experts, holder.config = parts.layer.module, parts.layer.module.config
    g = torch.Generator().manual_seed(1)
    tensors = {
        "ridge": 0.3 * torch.randn(4, 4, 64 + 5, generator=g),
        "cutoffs": torch.linspace(2, 0, 129),
        "shares": torch.linspace(0, 1, 129),
    }
    elastic = attach(holder, 4, gates=1, tensors=[tensors], layers=find_layers(holder))
    x, index, weight, _ = batch(parts, 20, 2, 1)
    bits = slot_bits((2.0, 3.0, 4.0, 8.0))
    elastic.step = Step(bind(elastic, [replace(FULL, slots=SlotRule(rule="bits", budget=0.4, bits=bits))]))
    found, layer = holder.experts(x, index, weight), elastic.layers[0]
    assert layer.coded(bits).packed and not layer.coded(bits)._at
    for way in ("reference", *(["triton"] if find_spec("triton") else [])):
        with computed(elastic, way):
            assert apart(found, holder.experts(x, index, weight)) < CLOSE


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("bits", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow), 8])
def test_tritons_kernels_read_planes(coded, bits):
    x, index, weight, keep = batch(coded.parts, 9, 2, 0.6, bits)
    gate, up, down = coded.packed
    found = triton_run.from_planes(coded.parts, (gate, up, down, bits), x, index, weight, keep)
    torch.testing.assert_close(found, reference(coded.at(bits), x, index, weight, keep), rtol=1e-4, atol=1e-5)

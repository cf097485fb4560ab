"""The Triton kernels against the reference. Without a GPU they run in Triton's interpreter (tests/conftest.py switches it on)."""

import os
import subprocess
import sys
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_prism.elastic import LayerParts, attach, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.execute import triton_run
from moe_prism.elastic.execute.plain import grouped, reference
from moe_prism.elastic.execute.triton_align import align, capacity
from moe_prism.model import find_layers
from moe_prism.point import FULL
from tests.elastic.common import computed
from tests.parity.families import build

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTORS = [triton_run.deterministic, triton_run.atomic]


def make(experts, hidden, block, n_sub, *, act="silu", dtype=torch.float32, seed=0, gates=0):
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=block * n_sub, num_experts=experts, hidden_act=act)
    config._experts_implementation = "eager"
    holder = torch.nn.Module()
    holder.experts, holder.config = OlmoeExperts(config).requires_grad_(False), config
    g = torch.Generator().manual_seed(seed)
    for p in holder.experts.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    holder.to(DEVICE, dtype)
    return LayerParts(find_layers(holder)[0], n_sub, gates)


def batch(plan, tokens, k, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    layer = plan.layer
    x = torch.randn(tokens, layer.hidden, generator=g).to(DEVICE, layer.up.dtype)
    index = torch.rand(tokens, layer.num_experts, generator=g).argsort(1)[:, :k].to(DEVICE)
    weight = torch.rand(tokens, k, generator=g).to(x)
    keep = (torch.rand(tokens, k, plan.n_sub, generator=g) < share).to(DEVICE)
    return x, index, weight, keep


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1e-6) if len(b) else 0)


@needs_triton
@given(data=st.data(), run=st.sampled_from(EXECUTORS))
@settings(max_examples=25, deadline=None)
def test_any_shape_equals_the_reference(data, run):
    """Sides that are no power of two and no multiple of a tile, choices without an expert, all mixtures of kept slots."""
    experts, n_sub = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    plan = make(experts, data.draw(st.integers(3, 70)), data.draw(st.integers(1, 37)), n_sub, seed=data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, experts))
    x, index, weight, keep = batch(
        plan, data.draw(st.integers(1, 9)), k, data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99))
    )
    if data.draw(st.booleans()):
        index[::2, -1] = -1
        keep &= (index >= 0)[:, :, None]
    assert triton_run.refusal(plan, x) is None
    close(run(plan, x, index, weight, keep), reference(plan, x, index, weight, keep))


@needs_triton
@pytest.mark.parametrize("run", EXECUTORS)
def test_corners(run):
    plan = make(3, 20, 5, 4)
    x, index, weight, keep = batch(plan, 9, 2, 0)
    assert run(plan, x, index, weight, keep).abs().max() == 0
    assert run(plan, x[:0], index[:0], weight[:0], keep[:0]).shape == (0, 20)
    keep[4, 1, 2] = True  # one slot of 72
    close(run(plan, x, index, weight, keep), reference(plan, x, index, weight, keep))
    mixed = torch.arange(8, device=DEVICE) < torch.arange(9, device=DEVICE)[:, None]  # token t keeps t of its 8 slots
    mixed = mixed.view(9, 2, 4)
    close(run(plan, x, index, weight, mixed), reference(plan, x, index, weight, mixed))


@needs_triton
@pytest.mark.parametrize("run", EXECUTORS)
def test_more_slots_than_one_tile_and_more_depth_than_one_step(run):
    plan = make(1, 150, 70, 2)
    inputs = batch(plan, 150, 1, 0.9)
    close(run(plan, *inputs), reference(plan, *inputs))


@needs_triton
@pytest.mark.parametrize("run", EXECUTORS)
def test_half_precision(run):
    plan = make(3, 40, 12, 2, dtype=torch.float16)
    inputs = batch(plan, 6, 2, 0.6)
    assert triton_run.refusal(plan, inputs[0]) is None
    close(run(plan, *inputs), reference(plan, *inputs), 2e-3)


def in_order(a, b, dtype=None):
    """a [m, k] x b [k, n], every sum from the first term to the last: one of a BLAS may depend on the row's place and the processor."""
    return np.cumsum(a[:, :, None] * b, axis=1, dtype=dtype)[:, -1]


@needs_triton
def test_a_token_has_the_same_bits_alone_and_in_any_batch(monkeypatch):
    monkeypatch.setattr(np, "matmul", in_order)  # what the interpreter makes of tl.dot; a GPU is not concerned
    plan = make(2, 48, 12, 2)
    x, index, weight, keep = batch(plan, 100, 2, 0.7)
    together = triton_run.deterministic(plan, x, index, weight, keep)
    for t in (0, 41, 99):
        alone = triton_run.deterministic(plan, *(v[t : t + 1] for v in (x, index, weight, keep)))
        assert torch.equal(alone[0], together[t])
    order = torch.arange(99, -1, -1, device=DEVICE)
    assert torch.equal(triton_run.deterministic(plan, *(v[order] for v in (x, index, weight, keep))), together[order])


@needs_triton
@pytest.mark.parametrize("run", EXECUTORS)
def test_weights_of_dropped_blocks_are_not_read(run):
    plan = make(3, 20, 5, 4)
    x, index, weight, keep = batch(plan, 7, 2, 0.5)
    keep[:, :, 1] = False
    expected = run(plan, x, index, weight, keep)
    for matrix in (plan.layer.gate, plan.layer.up):
        matrix[:, plan.neurons(1)] = float("nan")
    plan.layer.down[:, :, plan.neurons(1)] = float("nan")
    assert torch.equal(run(plan, x, index, weight, keep), expected)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("storage", ["neuron-major", "transposed", "dense"])
def test_weights_are_read_where_they_lie(storage):
    if storage == "neuron-major":
        plan = make(3, 24, 6, 2)
        plan.layer.arrange()
    else:
        model = build("aria") if storage == "transposed" else dense()
        plan = LayerParts(find_layers(model.to(DEVICE))[0], 2, 0)
    inputs = batch(plan, 5, min(2, plan.layer.num_experts), 0.6)
    assert triton_run.refusal(plan, inputs[0]) is None
    close(triton_run.deterministic(plan, *inputs), reference(plan, *inputs))


def dense():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=24, intermediate_size=36, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2))  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("act", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_activations_are_recognized_by_what_they_do(act, name):
    plan = make(2, 20, 6, 2, act=act)
    assert triton_run.activation(plan.layer) == name
    inputs = batch(plan, 5, 2, 0.6)
    close(triton_run.deterministic(plan, *inputs), reference(plan, *inputs))


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "reason"), [("gpt_oss", "biases"), ("nemotron_h", "no gate"), ("relu", "activation"), ("clamped", "activation")]
)
def test_what_the_kernels_cannot_do_runs_grouped(family, reason):
    if family in ("relu", "clamped"):
        plan = make(3, 16, 4, 2, act="relu" if family == "relu" else "silu")
        if family == "clamped":
            stock = plan.layer.module._apply_gate
            plan.layer.module._apply_gate = lambda both: stock(both.clamp(max=10.0))
    else:
        plan = LayerParts(find_layers(build(family).to(DEVICE), dense=False)[0], 4, 0)
    inputs = batch(plan, 5, 2, 0.6)
    assert reason in triton_run.refusal(plan, inputs[0])
    assert torch.equal(triton_run.deterministic(plan, *inputs), grouped(plan, *inputs))


@needs_triton
def test_gradients_run_grouped():
    plan = make(3, 16, 4, 2)
    x, *rest = batch(plan, 4, 2, 0.6)
    triton_run.deterministic(plan, x.requires_grad_(), *rest).sum().backward()
    assert x.grad.abs().max() > 0


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("way", ["triton", "triton-atomic"])
def test_a_model_runs_through_the_kernels(way, monkeypatch):
    model = build("olmoe").to(DEVICE)
    attach(model, 4)
    ids = torch.arange(3, 8, device=DEVICE)[None]
    with operating_point(model, 0.5, rule="whole-experts"):
        expected = model(ids).logits
    monkeypatch.setattr(triton_run, "grouped", None)
    with operating_point(model, 0.5, rule="whole-experts") as elastic, computed(elastic, way):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 999), tokens=st.integers(1, 40), share=st.floats(0, 1), height=st.sampled_from([1, 2, 16]))
@settings(max_examples=60, deadline=None)
def test_tiles_hold_every_kept_slot_once(seed, tokens, share, height):
    experts, k, n_sub = 5, 2, 3
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).argsort(1)[:, :k]
    keep = torch.rand(tokens, k, n_sub, generator=g) < share
    index[~keep.any(2)] = -1
    tiles = align(index, keep, experts, height)
    assert len(tiles.group) == capacity(keep.numel(), experts * n_sub, height)
    seen = []
    for group, first, end in zip(tiles.group.tolist(), tiles.first.tolist(), tiles.end.tolist(), strict=True):
        if group < 0:
            continue
        assert 0 < end - first <= height
        for slot in tiles.slots[first:end].tolist():
            assert int(index.flatten()[slot // n_sub]) * n_sub + slot % n_sub == group
            seen.append(slot)
    assert sorted(seen) == keep.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("height", [1, 4, 16])
def test_the_worst_case_fits(height):
    """Sub-experts that each need one more tile than their slots fill: the list must hold them, and no more."""
    experts, n_sub = 3, 2
    index = torch.tensor([[e] for e in range(experts) for _ in range(height + 1)])
    keep = torch.ones(len(index), 1, n_sub, dtype=torch.bool)
    used = int((align(index, keep, experts, height).group >= 0).sum())
    assert used == 2 * experts * n_sub if height > 1 else used == keep.numel()
    assert used <= capacity(keep.numel(), experts * n_sub, height) <= used + experts * n_sub


def compiles(*arguments):
    """Triton compiles for GPUs that are not there, down to machine code."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
def test_compiles_for_a_gpu():
    tile = triton_run.FIXED
    compiles("90", "bf16", *map(str, astuple(tile)[:5]))


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiles_for_every_tile_type_and_generation():
    for tile in (triton_run.SMALL, triton_run.FIXED, triton_run.LARGE):
        compiles("80,90", "bf16,fp32", *map(str, astuple(tile)[:5]))


@pytest.mark.gpu
@no_gpu
@needs_triton
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("run", EXECUTORS)
    @pytest.mark.parametrize("tokens", [1, 33, 700])
    def test_equals_the_reference(self, run, dtype, tokens):
        plan = make(16, 512, 96, 4, dtype=dtype)
        x, index, weight, keep = batch(plan, tokens, 4, 0.5)
        wide = LayerParts(make(16, 512, 96, 4).layer, 4, 0)
        for name in ("gate", "up", "down"):
            getattr(wide.layer, name).copy_(getattr(plan.layer, name))
        expected = grouped(wide, x.float(), index, weight.float(), keep)
        close(run(plan, x, index, weight, keep).float(), expected, {torch.float32: 1e-5}.get(dtype, 2e-2))

    def test_same_bits_alone_and_in_a_batch(self):
        plan = make(16, 512, 96, 4, dtype=torch.bfloat16)
        inputs = batch(plan, 700, 4, 0.5)
        together = triton_run.deterministic(plan, *inputs)
        assert torch.equal(triton_run.deterministic(plan, *inputs), together)
        for t in (0, 350, 699):
            assert torch.equal(triton_run.deterministic(plan, *(v[t : t + 1] for v in inputs))[0], together[t])

    @torch.no_grad()
    @pytest.mark.parametrize("tokens", [1, 48])
    @pytest.mark.parametrize("rule", ["product", "threshold"])
    def test_a_graph_captured_at_one_budget_replays_at_another(self, rule, tokens):
        plan = make(8, 256, 64, 4, dtype=torch.bfloat16, gates=1)
        holder = torch.nn.Module()
        holder.experts, holder.config = plan.layer.module, plan.layer.module.config
        side = {"ridge": torch.randn(8, 4, 256 + 5) * 0.05, "cutoffs": torch.linspace(4, 0, 129)}
        elastic = attach(holder, 4, gates=1, tensors=[side])
        x, index, weight, _ = batch(plan, tokens, 4, 1)
        budget = torch.full((tokens,), 0.25, device=DEVICE)
        with elastic.at(Step(bind(elastic, [FULL.with_slots(0.5, rule)]), 0, budget)), computed(elastic, "triton"):
            for _ in range(2):
                holder.experts(x, index, weight)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = holder.experts(x, index, weight)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for value in (0.25, 0.75, 0.5):
                budget.fill_(value)
                graph.replay()
                replayed = out.clone()
                assert torch.equal(replayed, holder.experts(x, index, weight))

    def test_one_compilation_for_all_budgets(self):
        from moe_prism.kernels import triton_kernels as kernels

        plan = make(8, 256, 64, 4, dtype=torch.bfloat16)

        def count():
            return [len(c[0]) for k in (kernels.gate_up, kernels.down, kernels.combine) for c in k.device_caches.values()]

        triton_run.deterministic(plan, *batch(plan, 48, 4, 1.0))
        before = count()
        for share in (0.0, 0.1, 0.5, 0.9):
            triton_run.deterministic(plan, *batch(plan, 48, 4, share))
        assert count() == before

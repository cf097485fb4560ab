"""Many fine-tunes over one base: each token has the experts of its own, and nobody notices the others."""

import pytest
import torch

import moe_prism
from moe_prism.adapters.file import Adapter, read_adapter
from moe_prism.artefact.open import open_to_write
from moe_prism.elastic.adapters import Adapters
from moe_prism.errors import UsageError
from moe_prism.jobs.adapter import with_adapters
from moe_prism.point import FULL, OperatingPoint, WeightChange
from tests.adapters.tuned import three

NAMES = ("a0", "a1", "a2")


@pytest.fixture(scope="module")
def tuned(shared, elastic_tiny):
    """Three fine-tunes of the elastic tiny model, and their adapters."""
    return shared("elastic-tiny-adapters", lambda folder: three(elastic_tiny, folder))


@pytest.fixture
def worn(elastic_tiny, tuned):
    """(model, adapters): all three, and room for two more experts of each layer."""
    model, _ = moe_prism.load(elastic_tiny)
    with torch.no_grad(), with_adapters(model, elastic_tiny, {name: tuned / name for name in NAMES}, room=2) as adapters:
        yield model, adapters


def ids(rows=4, length=12):
    return torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(7))


def run(model, adapters, which, prompt):
    """Logits [B, S, V] of a batch whose rows have these adapters, by name."""
    numbers = torch.tensor([-1 if name is None else adapters.number(name) for name in which])
    step = adapters.elastic.step
    step.adapter = numbers.repeat_interleave(prompt.shape[1])
    try:
        return model(prompt).logits
    finally:
        step.adapter = -1


def test_each_row_of_a_batch_is_that_of_its_merged_model(worn, tuned):
    model, adapters = worn
    prompt = ids()
    base = model(prompt).logits
    mixed = run(model, adapters, [*NAMES, None], prompt)
    for i, name in enumerate(NAMES):
        merged, _ = open_to_write(tuned / f"t{i}")
        want = merged(prompt[i : i + 1]).logits[0]
        torch.testing.assert_close(mixed[i], want, rtol=1e-5, atol=1e-5)
        assert torch.equal(mixed[i].argmax(-1), want.argmax(-1)) and (want - base[i]).abs().max() > 0.1
        with adapters.at(name):
            torch.testing.assert_close(model(prompt).logits[i], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[3], base[3], rtol=1e-5, atol=1e-5)


def test_what_neighbours_have_changes_no_bit_of_a_row(worn):
    model, adapters = worn
    prompt = ids()
    first = run(model, adapters, ["a0", "a1", "a2", None], prompt)
    second = run(model, adapters, [None, "a1", "a0", None], prompt)
    assert torch.equal(first[1], second[1]) and torch.equal(first[3], second[3])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])


def test_loading_and_unloading_changes_no_bit_of_the_others(worn, tuned):
    model, adapters = worn
    prompt = ids()
    before = run(model, adapters, ["a0", "a1", "a2", None], prompt)
    memory = adapters.bytes
    gone = adapters.unload("a0")
    assert adapters.bytes == memory - gone.bytes and list(adapters.loaded) == ["a1", "a2"]
    after = run(model, adapters, [None, "a1", "a2", None], prompt)
    assert torch.equal(before[1:], after[1:])
    adapters.load("again", read_adapter(tuned / "a0"))
    assert torch.equal(run(model, adapters, ["again", "a1", "a2", None], prompt), before)
    with pytest.raises(UsageError, match="no adapter 'a0' is loaded"):
        adapters.unload("a0")


def test_the_base_computes_the_same_bits_with_room_and_after(elastic_tiny, tuned):
    model, _ = moe_prism.load(elastic_tiny)
    prompt = ids()
    with torch.no_grad():
        before = model(prompt).logits
        with with_adapters(model, elastic_tiny, {"a0": tuned / "a0"}):
            assert torch.equal(model(prompt).logits, before)
        assert torch.equal(model(prompt).logits, before)


def test_points_of_a_budget_run_with_adapters(worn, tuned):
    model, adapters = worn
    prompt = ids(1)
    with moe_prism.operating_point(model, point=FULL.with_budget(0.5)), adapters.at("a2"):
        half = model(prompt).logits
    with adapters.at("a2"), moe_prism.operating_point(model, point=FULL.with_budget(0.5)):
        assert torch.equal(model(prompt).logits, half)
        with moe_prism.operating_point(model, point=FULL):
            full = model(prompt).logits
    assert not torch.equal(half, full)
    torch.testing.assert_close(full, open_to_write(tuned / "t2")[0](prompt).logits, rtol=1e-5, atol=1e-5)


def test_a_point_that_changes_the_experts_is_refused(worn):
    model, _ = worn
    weights = WeightChange(change="quantize", settings={"codec": "rtn", "options": {}, "bits": 4, "group": 32})
    with (
        pytest.raises(UsageError, match="leave one of them out"),
        moe_prism.operating_point(model, point=OperatingPoint(weights=weights)),
    ):
        pass


def test_an_adapter_that_cannot_be_written_leaves_nothing_behind(worn, tuned, monkeypatch):
    model, adapters = worn
    prompt = ids()
    before, free = run(model, adapters, ["a0", "a1", "a2", None], prompt), [own.table.free for own in adapters.layers]
    whole = Adapter.written

    def fails(self, layer, matrix, base):
        if layer == 1:
            raise MemoryError
        return whole(self, layer, matrix, base)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Adapter, "written", fails)
        adapters.load("more", read_adapter(tuned / "a0"))
    assert "more" not in adapters.loaded and [own.table.free for own in adapters.layers] == free
    assert torch.equal(run(model, adapters, ["a0", "a1", "a2", None], prompt), before)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(worn, tuned, tiny_source):
    _, adapters = worn
    with pytest.raises(UsageError, match="is loaded already"):
        adapters.load("a0", read_adapter(tuned / "a0"))
    adapters.load("more", read_adapter(tuned / "a0"))
    with pytest.raises(UsageError, match="tunes 2 experts of layer 0, and there is room for 0"):
        adapters.load("most", read_adapter(tuned / "a2"))
    assert "most" not in adapters.loaded
    with pytest.raises(UsageError, match="has adapters already"):
        Adapters(adapters.elastic, adapters.base, [1, 1])
    other, _ = open_to_write(tiny_source)
    with pytest.raises(UsageError, match="made for other weights"), with_adapters(other, tiny_source, {"a": tuned / "a0"}):
        pass

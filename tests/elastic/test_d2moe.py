"""A width per token and expert: the least loss for its bytes, a dial that spends what it says, and a fit that hits the means."""

import itertools
from dataclasses import replace

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.elastic.base import Slots
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.coded import CodedLayer, block_bytes
from moe_prism.elastic.rules.d2moe import D2Moe, read_rows
from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier.cost import measured_cost
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.find import method
from moe_prism.methods.slots.d2moe import fit_layer, slot_errors
from moe_prism.methods.statistics import statistics_of
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import OperatingPoint, SlotRule


@pytest.fixture(scope="module")
def subject(tiny_source, text_file):
    """A plain checkpoint: no sub-experts, no side tensors."""
    options = FrontierOptions(text=str(text_file), tokens=256, length=32, calibration_tokens=512)
    return subject_of(open_model(tiny_source), options)


@pytest.fixture(scope="module")
def points(subject):
    return [named.point for named in method("d2moe:widths=2-3-4-8:group=32").points(subject)]


def test_the_widths_are_the_least_loss_for_their_bytes(subject, points):
    """Of four slots, against every choice of widths that takes no more bytes; an error falls as the layer's does."""
    layer, bits = subject.elastic.layers[0], points[0].slots.bits
    rule = D2Moe(layer.parts, bits)
    sizes = {w: block_bytes(layer.parts, w, 32) for w in bits.widths}
    lost = dict(zip(bits.widths, bits.errors[0], strict=True))
    g = torch.Generator().manual_seed(0)
    for budget in (0.2, 0.4, 0.5, 0.6, 0.8):
        x, weight = torch.randn(1, layer.parts.layer.hidden, generator=g), torch.rand(1, 4, generator=g) + 0.05
        index = torch.randperm(layer.parts.layer.num_experts, generator=g)[None, :4]
        slots = Slots(x, index, weight, torch.ones(1, 4).bool(), 1, lambda: None)
        chosen = tuple(rule.widths(slots, torch.tensor([budget])).flatten().tolist())
        worth = rule.predicted(x, index, weight).flatten().double().exp().tolist()
        room = sum(sizes[w] for w in chosen)
        every = [ws for ws in itertools.product(sizes, repeat=4) if sum(sizes[w] for w in ws) <= room]
        losses = {ws: sum(lost[w] * e for w, e in zip(ws, worth, strict=True)) for ws in every}
        assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-6)


@torch.no_grad()
def test_a_budget_is_what_the_calibration_text_reads(subject, points):
    elastic, read = subject.elastic, []
    whole = (
        elastic.k * sum(layer.parts.layer.parameters_per_expert() for layer in elastic.layers) * elastic.stored_bytes_per_weight
    )
    for point in points:
        step = Step(bind(elastic, [point]))
        with elastic.at(step), elastic.count():
            subject.model(input_ids=subject.calibration)
            read.append(measured_cost(elastic, step).active_expert_bytes / whole)
        assert read[-1] == pytest.approx(point.slots.budget, rel=0.05)
    assert read == sorted(read, reverse=True)


@torch.no_grad()
def test_the_prediction_hits_the_mean_error_of_every_expert(subject, points):
    layer, bits = subject.elastic.layers[0], points[0].slots.bits
    own, statistics = layer.parts.layer, statistics_of(subject, ("counts", "tokens")).layers[0]
    coded = CodedLayer(layer.parts, bits)
    errors, text, levels = fit_layer(layer, replace(bits, router=None), statistics)
    rows, errors, levels = read_rows(text, own), torch.tensor(errors), torch.tensor(levels)
    assert errors[0] == 1 and bool((errors.diff() < 0).all()) and bool((levels.diff() <= 0).all())
    for e in range(own.num_experts):
        x, _ = statistics.inputs(e)
        lost = slot_errors(own, [coded.at(2.0).layer], e, x)[:, 0].log()
        assert float((x @ rows[e, :-1] + rows[e, -1]).mean()) == pytest.approx(float(lost.mean()), abs=0.02)


def test_it_survives_json_and_what_does_not_fit_is_refused(subject, points):
    point = points[0]
    assert OperatingPoint.from_json(point.to_json()) == point and point.is_per_token
    for name, value in (("rows", ["AAAA"] * 2), ("rows", ["?"] * 2), ("levels", [[1.0, 2.0]] * 2), ("levels", "x"), ("more", 1)):
        data = point.to_json()
        data["slots"]["bits"]["router"][name] = value
        with pytest.raises((CorruptError, UsageError)):
            bind(subject.elastic, [OperatingPoint.from_json(data)])
    with pytest.raises(UsageError, match="of another rule"):
        SlotRule(rule="bits", budget=0.2, bits=point.slots.bits)
    with pytest.raises(UsageError, match="of another rule"):
        SlotRule(rule="d2moe", budget=0.2, bits=replace(point.slots.bits, router=None))

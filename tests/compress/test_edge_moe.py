"""Bits by what the model loses with each expert alone: measured as it is said, within the bound, and no wider than that takes."""

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.decoded import SOURCE
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.find import method
from moe_prism.methods.quantize.edge_moe import STEPS, Trials
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import OperatingPoint


@pytest.fixture(scope="module")
def subject(tiny_source, text_file):
    options = FrontierOptions(text=str(text_file), tokens=256, length=32, calibration_tokens=512)
    return subject_of(open_model(tiny_source), options)


def measured(subject, widths, codec=None):
    change = QuantizeChange(codec or Rtn(), widths, 32)
    return measure(subject.model, subject.calibration, [OperatingPoint(weights=change.part())])[0].quality.kl


def test_an_expert_alone_is_the_point_with_that_expert_alone(subject):
    found, experts = Trials(subject, (2, 4), 32).alone(), [layer.parts.layer.num_experts for layer in subject.elastic.layers]
    for layer, e in ((0, 1), (1, 3)):
        widths = tuple(tuple(2.0 if (i, j) == (layer, e) else SOURCE for j in range(n)) for i, n in enumerate(experts))
        assert float(found[layer][e]) == pytest.approx(measured(subject, widths), rel=1e-4, abs=1e-9)
    assert all(bool((own >= 0).all()) for own in found)


def test_a_point_is_within_its_bound_and_takes_no_more_bits_than_that(subject):
    wide, narrow = (measured(subject, bits) for bits in (8.0, 2.0))
    bound = (wide * narrow) ** 0.5
    (named,) = method(f"edge-moe:{bound}").points(subject)
    change = change_of(named.point.weights)
    bits = torch.tensor(change.bits)
    assert measured(subject, change.bits) <= bound and 2 < float(bits.mean()) < 8
    losses = next(value for key, value in subject.cache.items() if key.startswith("experts at widths")).losses
    assert all(bool((own.diff(dim=1) <= 1e-12).all()) for own in losses)  # more bits lose less
    (wider,) = method(f"edge-moe:{bound * 1.3}").points(subject)
    assert float(torch.tensor(change_of(wider.point.weights).bits).mean()) <= float(bits.mean()) + 6 / STEPS


def test_a_bound_that_no_width_meets_is_refused(subject):
    with pytest.raises(UsageError, match="8 bits for all lose more than 1e-12"):
        method("edge-moe:bound=1e-12").points(subject)


def test_experts_may_be_in_the_planes_of_a_store(subject):
    """The loss that is bounded is that of nested planes."""
    wide, narrow = (measured(subject, bits, Nested(most=8)) for bits in (8.0, 4.0))
    bound = (wide * narrow) ** 0.5
    (named,) = method(f"edge-moe:bound={bound}:widths=4-8:codec=nested").points(subject)
    change = change_of(named.point.weights)
    assert change.codec == Nested(most=8) and {bits for row in change.bits for bits in row} <= {4.0, 8.0}
    assert measured(subject, change.bits, Nested(most=8)) <= bound and named.name.endswith("-of-4-8-nested")
    with pytest.raises(UsageError, match="no codec of experts at widths of their own"):
        method("edge-moe:codec=mxfp4").points(subject)

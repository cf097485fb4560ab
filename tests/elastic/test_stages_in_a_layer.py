"""What a layer does with stages that carry state or bring experts of their own: in a batch, alone, and when it is only asked."""

from dataclasses import replace

import pytest
import torch

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.model.extra import ExtraExperts
from moe_prism.point import FULL, OperatingPoint, RoutingStage
from moe_prism.routing import Stage, routing_stages
from tests.parity.families import build

IDS = torch.arange(3, 15)[None]


class Alternating(Stage):
    """Sends the last choice of every token to a constant expert in every second layer, by what it carries from the layer before."""

    needs = frozenset({"state"})
    extra = ExtraExperts(("constant",), torch.linspace(-1, 1, 32)[None])

    def keeps_all(self, variant, layer, k):
        return False

    def route(self, routed, which):
        turn = routed.state.get("turn", torch.zeros(len(routed.x)))
        routed.state["turn"] = 1 - turn
        index = routed.index.clone()
        index[turn == 0, -1] = routed.first_extra
        return replace(routed, index=index)


@pytest.fixture
def elastic(monkeypatch):
    get, names = routing_stages.get, routing_stages.names
    monkeypatch.setattr(routing_stages, "get", lambda name: Alternating if name == "alternating" else get(name))
    monkeypatch.setattr(routing_stages, "names", lambda: [*names(), "alternating"])
    return attach(build("olmoe"), 4)


def point(elastic):
    return OperatingPoint(routing=(RoutingStage(layers=(2,) * len(elastic.layers), stage="alternating", keep_mass=False),))


@torch.no_grad()
def test_state_runs_from_layer_to_layer_and_starts_anew(elastic):
    layers = len(elastic.layers)
    with operating_point(elastic.model, point=point(elastic)):
        for _ in range(2):
            with elastic.count():
                elastic.model(IDS)
            chosen = [layer.counter.chosen / IDS.numel() for layer in elastic.layers]
            assert chosen == [1 + n % 2 for n in range(layers)]
            read = [float(layer.counter.per_token["extra"]) / IDS.numel() for layer in elastic.layers[::2]]
            assert read == [32.0] * len(read)


@torch.no_grad()
def test_asking_what_is_kept_changes_neither_state_nor_counts(elastic):
    step = Step(bind(elastic, [point(elastic)]))
    seen = []

    def asked(layer):
        def run(x, index, weight):
            for _ in range(3):
                seen.append(layer.kept(step, x, index, weight).sum())
            return layer(x, index, weight)

        return run

    with elastic.at(step):
        with elastic.count():
            wanted = elastic.model(IDS).logits
        counts = [dict(layer.counter.per_token) for layer in elastic.layers]
        for layer in elastic.layers:
            layer.parts.layer.install(asked(layer))
        with elastic.count():
            assert torch.equal(elastic.model(IDS).logits, wanted)
    for layer, before in zip(elastic.layers, counts, strict=True):
        assert before.keys() == layer.counter.per_token.keys()
        assert all(torch.equal(layer.counter.per_token[name], value) for name, value in before.items())
    assert [int(n) for n in seen[::3]] == [int(layer.counter.kept) for layer in elastic.layers]


@torch.no_grad()
def test_tokens_of_other_points_do_not_see_it(elastic):
    """One batch of a stage with state, whole experts and the model itself: every row as if it were alone."""
    rows = torch.arange(3, 39).reshape(3, 12) % 31 + 2
    points = [point(elastic), FULL.with_budget(0.5, "whole-experts"), FULL]
    which = torch.arange(3).repeat_interleave(12)
    with operating_point(elastic.model, point=points, which=which):
        mixed = elastic.model(rows).logits
    for number, row in enumerate(rows):
        with operating_point(elastic.model, point=points, which=number):
            torch.testing.assert_close(elastic.model(row[None]).logits[0], mixed[number], rtol=1e-5, atol=1e-5)

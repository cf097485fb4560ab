"""What a routing stage may do beyond leaving experts out: ask for scores, for the residual stream, carry state, add experts, chain."""

from dataclasses import replace

import pytest
import torch

from moe_prism import routing
from moe_prism.artefact.load import load
from moe_prism.elastic.bind import Step, bind
from moe_prism.errors import UsageError
from moe_prism.model.extra import ExtraExperts
from moe_prism.model.router import find_routers
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule
from moe_prism.registry import Entry
from moe_prism.routing.base import SkipStage, Stage
from moe_prism.store import StoreOptions


class Wider(Stage):
    """Every token takes one expert more than the router chose: the next by probability, with that as its weight."""

    needs = frozenset({"scores"})

    def keeps_all(self, variant, layer, k):
        return False

    def route(self, routed, which):
        scores = routed.scores().clone()
        scores.scatter_(1, routed.index.clamp(min=0), -1.0)
        weight, index = scores.max(1, keepdim=True)
        joined = torch.cat([routed.weight, weight.to(routed.weight.dtype)], 1)
        return replace(routed, index=torch.cat([routed.index, index], 1), weight=joined)


class ZeroCopyConstant(Stage):
    """The last choice of token t becomes a zero, a copy or a constant expert, by t mod 3."""

    extra = ExtraExperts(("zero", "copy", "constant"), torch.full((1, 32), 0.25))

    def keeps_all(self, variant, layer, k):
        return False

    def route(self, routed, which):
        index = routed.index.clone()
        index[:, -1] = routed.first_extra + torch.arange(len(index)) % 3
        return replace(routed, index=index)


class Carrying(Stage):
    """Counts layers in the state, and skips the second expert from the second layer on where the first layer's weight was large."""

    needs = frozenset({"state"})

    def keeps_all(self, variant, layer, k):
        return False

    def route(self, routed, which):
        if "first" not in routed.state:
            routed.state["first"] = routed.weight[:, :1].clone()
            return routed
        skip = routed.state["first"] > routed.weight.mean()
        gone = torch.cat([torch.zeros_like(skip), skip.expand(-1, routed.index.shape[1] - 1)], 1)
        return replace(routed, index=routed.index.masked_fill(gone, -1), weight=routed.weight.masked_fill(gone, 0.0))


class Seeing(SkipStage):
    """Keeps the second expert where the residual stream begins with a positive number."""

    needs = frozenset({"residual"})
    seen: list = []  # noqa: RUF012 - a test's notebook

    def keeps_all(self, variant, layer, k):
        return False

    @staticmethod
    def rank_by(routed):
        stream = routed.residual()
        Seeing.seen.append((routed.x.clone(), stream.clone()))
        return routed.weight.float().abs() + (stream[:, :1] > 0)  # weights are below 1

    def kept(self, ranked, layer, which):
        keep = ranked >= 1
        keep[:, 0] = True
        return keep


OWN = {"wider": Wider, "extras": ZeroCopyConstant, "carrying": Carrying, "seeing": Seeing}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, stage in OWN.items():
        monkeypatch.setitem(routing.routing_stages._builtin, name, Entry(f"{__name__}:{stage.__name__}", "of a test"))
        monkeypatch.delitem(routing.routing_stages._resolved, name, raising=False)


@pytest.fixture(scope="module")
def model(elastic_tiny):
    return load(elastic_tiny)[0]


def point(name, layers, **slots):
    return OperatingPoint(
        routing=(RoutingStage(layers=(9,) * layers, stage=name, keep_mass=False),),
        slots=SlotRule(**slots) if slots else SlotRule(),
    )


@pytest.fixture
def at(model, monkeypatch):
    """logits(points, ids, which): the stages may keep more than k, which a plan of counts may not say."""
    monkeypatch.setattr(RoutingStage, "check", lambda *_: None)
    elastic = model._moe_prism

    @torch.no_grad()
    def logits(points, ids, which=0):
        with elastic.at(Step(bind(elastic, points), which)):
            return model(input_ids=ids).logits

    return logits


IDS = (torch.arange(30)[None] * 37) % 4000


@pytest.mark.parametrize("slots", [{}, {"budget": 0.6}])
def test_more_experts_than_the_router_chose(model, at, slots):
    """Against the layer's own formula with one more expert, by hand."""
    elastic = model._moe_prism
    layers = len(elastic.layers)
    at([FULL], IDS)
    layer, own = elastic.layers[0], elastic.layers[0].parts.layer
    x = torch.randn(11, own.hidden)
    router = find_routers(model, [own])[0]
    index, weight = router.route(x)
    step = Step(bind(elastic, [point("wider", layers, **slots)]))
    found = layer.candidates(step, x, index, weight)
    assert found.index.shape[1] == index.shape[1] + 1
    probabilities = torch.nn.functional.linear(x, router.rows[0].get()).softmax(-1)
    order = probabilities.argsort(1, descending=True)
    assert torch.equal(found.index[:, -1], order[:, index.shape[1]])
    torch.testing.assert_close(found.weight[:, -1], probabilities.gather(1, order)[:, index.shape[1]])
    if not slots:
        with elastic.at(step), torch.no_grad():
            out = layer(x, index, weight)
            expected = own.stock(x, found.index, found.weight)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


def test_experts_that_are_not_weights(model, at):
    """Zero, copy and constant experts against the formula; what they read is counted."""
    elastic = model._moe_prism
    layer, own = elastic.layers[0], elastic.layers[0].parts.layer
    x = torch.randn(9, own.hidden)
    index, weight = find_routers(model, [own])[0].route(x)
    with elastic.at([point("extras", len(elastic.layers))]), elastic.count(), torch.no_grad():
        out = layer(x, index, weight)
    expected = own.stock(x, index[:, :-1], weight[:, :-1])
    for t in range(len(x)):
        added = (0.0, x[t], torch.full((own.hidden,), 0.25))[t % 3]
        expected[t] += weight[t, -1] * added
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    assert float(layer.counter.per_token["extra"]) == 3 * own.hidden and float(layer.counter.per_batch["extra"]) == own.hidden


@pytest.mark.parametrize("name", OWN)
def test_alone_and_beside_others(model, at, name):
    layers = len(model._moe_prism.layers)
    points = [point(name, layers), FULL.with_budget(0.5), FULL, point(name, layers, budget=0.7)]
    ids = torch.stack([IDS[0, :24] + i for i in range(len(points))])
    mixed = at(points, ids, torch.arange(len(points)).repeat_interleave(24))
    for row, own in enumerate(points):
        alone = at([own], ids[row : row + 1])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_state_lasts_for_one_forward(model, at):
    layers = len(model._moe_prism.layers)
    first = at([point("carrying", layers)], IDS)
    assert torch.equal(at([point("carrying", layers)], IDS), first)
    assert not torch.equal(at([FULL], IDS), first)


def test_the_residual_stream_is_what_the_norm_before_the_layer_got(model, at):
    Seeing.seen.clear()
    elastic = model._moe_prism
    at([point("seeing", len(elastic.layers))], IDS)
    assert len(Seeing.seen) == len(elastic.layers)
    for number, (x, stream) in enumerate(Seeing.seen):
        norm = model.model.layers[number].post_attention_layernorm
        torch.testing.assert_close(norm(stream), x)


def test_stages_run_one_after_the_other(model, at):
    layers = len(model._moe_prism.layers)
    wider, two = point("wider", layers).routing[0], RoutingStage(layers=(1,) * layers, keep_mass=False)
    both = OperatingPoint(routing=(wider, two))
    only = OperatingPoint(routing=(two,))
    assert torch.equal(at([both], IDS), at([only], IDS))  # the third expert is never a token's best


def test_from_the_store_too(elastic_tiny, model, at, tmp_path):
    stored, _ = load(elastic_tiny, store=StoreOptions(90_000, tmp_path / "pack", ahead=2))
    layers = len(model._moe_prism.layers)
    for name in OWN:
        wanted = at([point(name, layers, budget=0.8)], IDS)
        with stored._moe_prism.at([point(name, layers, budget=0.8)]), torch.no_grad():
            torch.testing.assert_close(stored(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_two_stages_with_experts_of_their_own_are_refused(model, at):
    stage = point("extras", len(model._moe_prism.layers)).routing[0]
    with pytest.raises(UsageError, match="two routing stages bring experts"):
        bind(model._moe_prism, [OperatingPoint(routing=(stage, stage))])

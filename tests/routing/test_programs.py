"""Stages that belong to one method each, against their definitions, and what makes each of them worth having."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.skip.base import skip_method
from moe_prism.methods.skip.lexi import distances
from moe_prism.methods.skip.odp import importance as l1
from moe_prism.methods.skip.otp import OtpParameters, settled, train
from moe_prism.methods.skip.profile import samples, scores, views
from moe_prism.methods.skip.top_p import TopP, fit_top_p, mean_of
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage
from moe_prism.routing import Routed, stage_class

T, E, K = 40, 8, 3


@pytest.fixture(scope="module")
def subject(elastic_tiny, text_file):
    options = FrontierOptions(text=str(text_file), tokens=512, length=32, calibration_tokens=1024, per_method=3)
    return subject_of(open_model(elastic_tiny), options)


def batch(seed=0, flat=False):
    """A softmax router's choice, not normalised, in an order that says nothing."""
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(T, E, generator=g) * (0.01 if flat else 1.5)).softmax(1)
    index = p.topk(K).indices[:, torch.randperm(K, generator=g)]
    x = torch.randn(T, 4, generator=g)
    return Routed(x, index, p.gather(1, index), 0, E, E, scores=lambda: p), p


def stage(name, parameters, layers=(K,), keep_mass=False):
    rows = {key: ((float(value),),) for key, value in parameters.items()}
    return stage_class(name)([RoutingStage(layers=layers, stage=name, parameters=rows, keep_mass=keep_mass)])


def dense(routed):
    """[T, E] weights."""
    found = torch.zeros(T, E + 1)
    return found.scatter_add_(1, routed.index.masked_fill(routed.index < 0, E), routed.weight)[:, :E]


@pytest.mark.parametrize(("p", "most", "keep_mass"), itertools.product((0.0, 0.4, 0.8, 1.0), (2, E), (False, True)))
def test_top_p_takes_the_shortest_prefix_that_exceeds_p(p, most, keep_mass):
    routed, probabilities = batch()
    found = dense(stage("top-p", {"p": p}, (most,), keep_mass)(routed))
    for t, row in enumerate(probabilities):
        wanted, held = [], 0.0
        for e in row.argsort(descending=True).tolist():
            if len(wanted) == most or (wanted and held > p):
                break
            wanted.append(e)
            held += float(row[e])
        assert set(found[t].nonzero().flatten().tolist()) == set(wanted)
        scale = float(routed.weight[t].sum()) / held if keep_mass else 1.0
        torch.testing.assert_close(found[t][wanted], row[wanted] * scale)


def test_top_p_is_one_expert_at_zero_all_at_one_and_most_binds_where_nothing_stands_out():
    routed, probabilities = batch()
    counts = [int((stage("top-p", {"p": p}, (E,))(routed).index >= 0).sum()) for p in (0.0, 0.2, 0.5, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == T and counts[-1] == T * E
    flat, _ = batch(flat=True)
    assert ((stage("top-p", {"p": 0.9}, (4,))(flat).index >= 0).sum(1) == 4).all()
    entropy = -(probabilities * probabilities.log()).sum(1)
    taken = (stage("top-p", {"p": 0.6}, (E,))(routed).index >= 0).sum(1).float()
    assert torch.corrcoef(torch.stack([entropy, taken]))[0, 1] > 0.5


def test_top_p_off_beside_on_keeps_the_routers_choice():
    routed, _ = batch()
    pair = [RoutingStage(layers=(E,), stage="top-p", parameters={"p": ((p,),)}, keep_mass=False) for p in (-1.0, 0.9)]
    which = torch.arange(T) % 2
    found, own = dense(TopP(pair)(routed, which)), dense(routed)
    assert torch.equal(found[::2], own[::2]) and not torch.equal(found[1::2], own[1::2])


def test_top_p_meets_its_mean_in_every_layer(subject):
    for mean in (1.25, 1.5, 2.0):
        found = scores(subject)
        made = fit_top_p(found, mean, 4)
        for own, (p,) in zip(found, made.parameters["p"], strict=True):
            assert mean_of(own, p, 4) == pytest.approx(mean, rel=0.02)


def test_odp_drops_its_quantile_and_spares_what_is_important():
    routed, _ = batch()
    norms = l1(routed)
    guard = float(norms.sort().values[-2])
    made = stage("odp", {"t": 0.5, "least": 1, "guard": guard})(routed)
    spared = norms >= guard
    assert int(spared.sum()) == 2
    assert torch.equal(made.index[spared], routed.index[spared]) and torch.equal(made.weight[spared], routed.weight[spared])
    plain = stage("token-threshold", {"t": 0.5, "least": 1})(routed)
    assert torch.equal(dense(made)[~spared], dense(plain)[~spared])
    assert int((plain.index[spared] < 0).sum()) > 0  # they would have lost something
    whole = stage("odp", {"t": 0.0, "least": 1, "guard": guard})
    assert whole(routed) is routed
    first = dense(stage("odp", {"t": 1.0 + 1e-6, "least": 2, "guard": 0})(routed))
    assert ((first > 0).sum(1) == 2).all()


def test_odp_is_fitted_to_its_quantile_its_layers_and_its_mean(subject):
    fitted = skip_method("odp:layers=0.5:guard=0").fit(subject, 1.75)
    (pruned,), t = fitted.facts["pruned_layers"], [row[0] for row in fitted.stage.parameters["t"]]
    assert [value > 0 for value in t] == [layer == pruned for layer in range(subject.layers)]
    own = samples(subject)[pruned]
    dropped = float((own[:, 1:] < t[pruned] * own[:, :1]).double().mean())
    assert dropped == pytest.approx(fitted.facts["quantile"], abs=0.01) and fitted.mean == pytest.approx(1.75, abs=0.01)
    spared = skip_method("odp:layers=1:guard=0.1").fit(subject, 1.5).stage
    for layer, norms in enumerate(views(subject, "importance", l1)):
        assert float((norms >= spared.parameters["guard"][layer][0]).double().mean()) == pytest.approx(0.1, abs=0.01)
    with pytest.raises(UsageError, match="outside what odp takes"):
        skip_method("odp:layers=0").fit(subject, 1.5)


def test_lexi_measures_what_fewer_experts_do_to_random_inputs(subject):
    from moe_prism.methods.skip.lexi import ROWS
    from moe_prism.model.router import Router

    found = distances(subject)
    layer = subject.elastic.layers[0].parts.layer
    x = torch.randn(ROWS, layer.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        index, weight = Router(subject.model, layer).route(x)
        first = weight.argmax(1, keepdim=True)
        other = layer.stock(x, index.gather(1, 1 - first), weight.gather(1, 1 - first))  # all of k = 2 but the first
    assert found[0] == pytest.approx([float(other.norm()), 0.0], rel=1e-4)
    fitted = skip_method("lexi").fit(subject, 1.5)
    assert sum(fitted.stage.layers) == 3
    assert fitted.facts["predicted_loss"] == pytest.approx(min(row[0] for row in found), rel=1e-4)


def test_alloc_is_its_two_halves(subject):
    one, two = (skip_method(name).point(subject, 1.5).point for name in ("alloc", "batch-redistribution:sensitivity:isolated"))
    assert one == two


def test_otp_keeps_all_at_no_price_and_less_at_a_higher_one(subject):
    shares = []
    for price in (0.0, 0.01, 10.0):
        nets, last = train(subject, 2.0, OtpParameters(steps=25, price=price))
        assert last == price
        inputs, weights = views(subject, "input", lambda r: r.x), samples(subject)
        kept = [net.scores(x, w).argmax(1).double().mean() + 1 for net, x, w in zip(nets, inputs, weights, strict=True)]
        shares.append(float(sum(kept)) / len(kept) / 2)
    assert shares[0] > 0.95 and shares == sorted(shares, reverse=True) and shares[2] < shares[0] - 0.1


def test_otp_meets_its_mean_and_a_token_keeps_its_first(subject):
    fitted = skip_method("otp:3").fit(subject, 1.5)
    assert fitted.mean == pytest.approx(1.5, abs=0.01)
    made = stage_class("otp")([replace(fitted.stage, keep_mass=False)])
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(T, 32, generator=g), torch.rand(T, 2, generator=g)
    index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(T)])
    after = made(Routed(x, index, weight, 0, 4, 4))
    largest = index.gather(1, weight.argmax(1, keepdim=True))
    assert (after.index == largest).any(1).all()
    ranked = weight.sort(dim=1, descending=True).values
    net = made._net(0, 0, 34, ranked)
    assert torch.equal((after.index >= 0).sum(1), net.scores(x, ranked).argmax(1) + 1)
    assert settled([torch.zeros(10, 3)], 3.0) > 0 > settled([torch.zeros(10, 3)], 1.0) - 1e-9
    for wrong, words in (("otp:0", "no step"), ("otp:steps=2:price=1", "says how many experts stay")):
        with pytest.raises(UsageError, match=words):
            skip_method(wrong).fit(subject, 1.5)


@pytest.mark.parametrize("base", [1, 2])
def test_oea_adds_what_the_batch_reads_anyway(base):
    routed, _ = batch()
    few = replace(routed, x=routed.x[:5], index=routed.index[:5].clone(), weight=routed.weight[:5])
    few.index[4] = -1  # a row of another point
    found = stage("oea", {"base": base})(few)
    first = [few.index[t][few.weight[t].argsort(descending=True)[:base]].tolist() for t in range(4)]
    union = set(itertools.chain(*first))
    for t in range(4):
        kept = set(found.index[t][found.index[t] >= 0].tolist())
        assert kept == set(first[t]) | (set(few.index[t].tolist()) & union)
    assert (found.index[4] == -1).all()
    alone = stage("oea", {"base": base})(replace(few, x=few.x[:1], index=few.index[:1], weight=few.weight[:1]))
    assert int((alone.index >= 0).sum()) == base


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_xshare_reads_what_the_batch_scores_highest_and_every_first(share):
    routed, p = batch()
    few = Routed(routed.x[:6], routed.index[:6], routed.weight[:6], 0, E, E, scores=lambda: p[:6])
    found = stage("xshare", {"share": share})(few)
    first = set(p[:6].argmax(1).tolist())
    rest = sorted((e for e in range(E) if e not in first), key=lambda e: -float(p[:6, e].sum()))
    read = first | set(rest[: max(0, int(share * E) - len(first))])
    for t in range(6):
        wanted = sorted(read, key=lambda e: -float(p[t, e]))[:K]
        kept = found.index[t][found.index[t] >= 0].tolist()
        assert sorted(kept) == sorted(wanted)
        weights = dict(zip(found.index[t].tolist(), found.weight[t].tolist(), strict=True))
        assert all(weights[e] == pytest.approx(float(p[t, e]), rel=1e-5) for e in wanted)


@torch.no_grad()
def test_odp_computes_a_spared_token_as_the_model_does(subject):
    """In a layer whose input is the same: the first."""
    elastic, ids = subject.elastic, subject.calibration[:2]
    spared = skip_method("odp:layers=1:guard=0.2").point(subject, 1.25).point

    def outputs(point):
        layer, seen = elastic.layers[0], []

        def watched(x, index, weight):
            seen[:] = [x, layer(x, index, weight)]
            return seen[1]

        layer.parts.layer.install(watched)
        try:
            with elastic.at([point]):
                subject.model(input_ids=ids)
        finally:
            layer.parts.layer.install(layer)
        return seen

    (x, whole), (_, found) = outputs(FULL), outputs(spared)
    guard = spared.routing[0].parameters["guard"][0][0]
    kept = x.abs().sum(1) >= guard
    assert 0 < int(kept.sum()) < len(kept)
    torch.testing.assert_close(found[kept], whole[kept], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[~kept], whole[~kept])


@torch.no_grad()
def test_gate_threshold_is_refused_where_neurons_cannot_be_left_out(subject, elastic_tiny, tmp_path):
    from moe_prism.artefact.load import load
    from moe_prism.elastic.bind import bind
    from moe_prism.methods.find import method
    from moe_prism.point import SlotRule
    from moe_prism.serve.vllm.refusal import refusal
    from moe_prism.store import StoreOptions

    point = skip_method("gate-threshold").point(subject, 1.5).point
    assert "single neurons" in str(refusal(point))
    pruned = method("prune:soft-count").points(subject)[0].point
    with pytest.raises(UsageError, match="stores the experts otherwise"):
        bind(subject.elastic, [replace(point, weights=pruned.weights)])
    stored, _ = load(elastic_tiny, store=StoreOptions(1 << 30, tmp_path / "experts.pack"))
    with pytest.raises(UsageError, match="not computed where this model's experts are"):
        bind(stored._moe_prism, [point])
    ids = subject.calibration[:1]
    both = OperatingPoint(routing=point.routing, slots=SlotRule(budget=0.5, rule="product"))
    with subject.elastic.at([both]):  # blocks and neurons together
        assert torch.isfinite(subject.model(input_ids=ids).logits).all()
    with pytest.raises(UsageError, match="reads every gate"):
        skip_method("gate-threshold").fit(subject, 0.5)


def test_gate_threshold_keeps_its_share_of_neurons(subject):
    from moe_prism.elastic.execute.above import gate_sizes

    stage = skip_method("gate-threshold").fit(subject, 1.5).stage
    layer, x = subject.elastic.layers[0].parts.layer, views(subject, "input", lambda r: r.x)[0]
    index = views(subject, "index", lambda r: r.index)[0]
    sizes = torch.cat([gate_sizes(layer, e, x[(index == e).any(1)])[1] for e in range(layer.num_experts)])
    share = float((sizes >= stage.parameters["cutoff"][0][0]).double().mean())
    assert share == pytest.approx((1.5 / 2 - 1 / 3) * 1.5, abs=0.02)

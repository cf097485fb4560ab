"""The method protocol: names, what a point installs, the columns of its points, plain checkpoints."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.catalogue import methods
from moe_prism.compress.changes import Change, weight_changes
from moe_prism.elastic.bind import bind
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import evaluation_windows, measure_frontier, subject_of
from moe_prism.jobs.skip import make_skip_plan, with_parameters
from moe_prism.methods.base import Method
from moe_prism.methods.find import method
from moe_prism.methods.skip.base import skip_method
from moe_prism.methods.skip.profile import losses, profile, refine, samples
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.skip import SkipOptions
from moe_prism.point import NamedPoint, OperatingPoint, write_point
from moe_prism.registry import Entry

SKIPPING = "uniform,pattern-skip,sensitivity,ser,naee,score-mass,weight-cutoff,batch-redistribution:uniform"


def options(text_file, **changes):
    return FrontierOptions(text=str(text_file), tokens=128, length=32, calibration_tokens=128, **changes)


@pytest.fixture(scope="module")
def opened(tiny_source):
    return open_model(tiny_source)


@pytest.fixture
def subject(opened, text_file):
    return subject_of(opened, options(text_file))


class WithoutFirst(Change):
    """Expert 0 of the first layer gives nothing."""

    name = "first"
    resident_share = 0.75
    entered = 0

    @classmethod
    def from_settings(cls, settings):
        return cls()

    def settings(self):
        return {}

    @contextmanager
    def installed(self, model, layers):
        before = layers[0].down[0].clone()
        layers[0].down[0].zero_()
        WithoutFirst.entered += 1
        try:
            yield
        finally:
            layers[0].down[0].copy_(before)


@dataclass(frozen=True, kw_only=True)
class Argument:
    which: str = "first"


class Masked(Method):
    """A stand-in for pruning: expert 0 is worth nothing at its point."""

    acts = "weights"
    Parameters = Argument

    def points(self, subject):
        return [NamedPoint(name=f"{self.name}-3", point=OperatingPoint(weights=WithoutFirst().part()))]


@pytest.fixture
def masked(monkeypatch):
    monkeypatch.setitem(methods._builtin, "mask", Entry("tests.jobs.test_methods:Masked", "for this test"))
    monkeypatch.setitem(weight_changes._builtin, "first", Entry("tests.jobs.test_methods:WithoutFirst", "for this test"))
    WithoutFirst.entered = 0


def test_a_plain_checkpoint_and_all_methods_on_one_chart(tiny_source, text_file, masked):
    result = measure_frontier(tiny_source, options(text_file, methods=("mask:first", *SKIPPING.split(","))))
    assert result.n_sub == 1 and {p.rule for p in result.points} == {"mask:first", *SKIPPING.split(",")}
    by_name = {p.name: p for p in result.points}
    full = by_name["full"]
    assert full.kl == 0 and full.budget == 1
    assert by_name["uniform-1"].active_expert_bytes == full.active_expert_bytes / 2
    plain = {p.name: p for p in result.baseline_topk}
    assert by_name["uniform-1"].kl == pytest.approx(plain["top-1"].kl, rel=1e-5)
    pruned = by_name["mask:first-3"]
    assert pruned.kl > 0 and pruned.resident_expert_bytes == 0.75 * full.resident_expert_bytes and pruned.budget == 0.75
    assert full.resident_expert_bytes == 2 * 4 * 3 * 16 * full_hidden(tiny_source) * stored(tiny_source)
    assert WithoutFirst.entered == 1  # 128 tokens are one batch


def full_hidden(source):
    return open_model(source).elastic.layers[0].parts.layer.hidden


def stored(source):
    return open_model(source).elastic.stored_bytes_per_weight


@pytest.mark.slow
@torch.no_grad()
def test_plain_top_k_is_what_a_router_that_normalises_does_with_fewer_experts(text_file):
    """nano-mix scales the weights of its choice to 1, whatever their number."""
    asked = options(text_file, methods=("uniform",))
    plain = {p.name: p for p in measure_frontier("nano-mix", asked).baseline_topk}
    opened = open_model("nano-mix")
    opened.elastic.detach()
    ids = evaluation_windows(opened.tokenizer, opened.documents, asked).ids

    def predicted(k):
        for layer in opened.model.model.layers:
            layer.mlp.gate.top_k = k
        return opened.model(input_ids=ids).logits[:, :-1].log_softmax(-1)

    source = predicted(4)
    for k in (3, 2, 1):
        kl = float((source.exp() * (source - predicted(k))).sum(-1).mean())
        assert plain[f"top-{k}"].kl == pytest.approx(kl, rel=1e-4) and plain[f"top-{k}"].budget == pytest.approx(k / 4)


def save_plan(source, text_file, path):
    """One expert per token, in a file that names the point as the file."""
    named = make_skip_plan(source, plan_options(text_file, method="uniform", mean=1))
    write_point(path, replace(named, name=path.stem))


def plan_options(text_file, **changes):
    return SkipOptions(text=str(text_file), tokens=128, length=32, **changes)


def test_rules_and_skipping_together_on_an_elastic_folder(elastic_tiny, text_file, tmp_path):
    save_plan(elastic_tiny, text_file, tmp_path / "one.json")
    chosen = options(text_file, rules=("product",), methods=("product", "uniform"), given=(str(tmp_path / "one.json"),))
    result = measure_frontier(elastic_tiny, chosen)
    assert [p.rule for p in result.points if p.rule != "product"] == ["uniform", "given point"]
    one, uniform = (next(p for p in result.points if p.name == name) for name in ("one", "uniform-1"))
    assert one.kl == uniform.kl
    product = next(p for p in result.points if p.rule == "product" and p.budget < 1)
    assert product.resident_expert_bytes > uniform.resident_expert_bytes  # its predictor
    assert result.provenance["options"]["given"] == ["one.json"]


@pytest.mark.parametrize(
    "name", ["best", "product:2", "uniform:2", "sensitivity:best", "pattern-skip:1-2", "pattern-skip:a-b-c-d", "ser:9", "naee:1"]
)
def test_what_is_no_method(subject, name):
    with pytest.raises(UsageError):
        method(name).points(subject)


def test_rules_with_predictors_need_sub_experts(tiny_source, text_file):
    with pytest.raises(UsageError, match="needs sub-experts"):
        measure_frontier(tiny_source, options(text_file, methods=("threshold",)))


def test_a_point_has_one_name(tiny_source, text_file, tmp_path):
    save_plan(tiny_source, text_file, tmp_path / "full.json")
    with pytest.raises(UsageError, match="two points are called 'full'"):
        measure_frontier(tiny_source, options(text_file, methods=("uniform",), given=(str(tmp_path / "full.json"),)))


def test_a_model_of_one_expert_per_token_has_nothing_to_skip(tiny_dense, text_file):
    with pytest.raises(UsageError, match="one per token"):
        measure_frontier(tiny_dense, options(text_file, methods=("uniform",)))


@pytest.mark.parametrize("isolated", [False, True])
def test_the_profile_is_one_run_per_layer_and_count(subject, isolated):
    found = profile(subject, isolated=isolated)
    assert len(found) == 2 and all(row[-1] == 0 for row in found)
    after = 1 if isolated else 2
    whole, less = losses(subject, [(2, after), (1, after)])
    assert found[0][0] == pytest.approx(less - whole)
    assert found[1][0] == pytest.approx(losses(subject, [(2, 1)])[0])
    assert profile(subject, isolated=isolated) is found  # measured once


@pytest.mark.parametrize("variant", ["", ":isolated", ":alone"])
def test_sensitivity_finds_the_best_split(subject, variant):
    """With two layers and three experts in all there are two plans; the better one by brute force is found."""
    named = skip_method(f"sensitivity{variant}").point(subject, 1.5)
    (stage,) = named.point.routing
    one, two = losses(subject, [(1, 2), (2, 1)])
    best = (1, 2) if one < two else (2, 1)
    assert named.made["mean"] == 1.5 and sum(stage.layers) == 3
    if variant != ":isolated":
        assert stage.layers == best
    assert refine(subject, best[::-1]) == (best, pytest.approx(min(one, two)))


def test_samples_are_the_routing_weights(opened, subject):
    rows = samples(subject)
    assert [r.shape for r in rows] == [(128, 2)] * 2 and all((r.diff(dim=1) <= 0).all() for r in rows)
    assert opened.elastic.step is opened.elastic.full_step and not opened.elastic.counting


def test_plans_record_how_they_were_made_and_what_they_cost(tiny_source, text_file):
    plan = make_skip_plan(tiny_source, plan_options(text_file, method="ser", mean=1.5, keep_mass=True))
    assert plan.point.routing[0].keep_mass is True and plan.made["method"] == "ser" and plan.made["quality"]["kl"] > 0
    assert 1 <= plan.made["quality"]["experts_per_token"] <= 2 and plan.made["experts_per_token"] == 2


def test_pattern_knots_rounding_and_index(subject):
    def make(mean, **parameters):
        return with_parameters(skip_method("pattern-skip:2-1-1-2"), parameters).fit(subject, mean).stage.layers

    assert make(None) == (2, 1)
    assert make(2.0) == (2, 2)
    assert make(None, index_over="all") == (2, 1)
    with pytest.raises(UsageError, match="needs a mean"):
        skip_method("sensitivity").fit(subject, None)
    with pytest.raises(UsageError, match=r"cannot keep 1\.5"):
        skip_method("uniform").fit(subject, 1.5)
    with pytest.raises(UsageError, match="gives no counts"):
        skip_method("weight-cutoff:ser").fit(subject, 1.5)
    with pytest.raises(UsageError, match="'ser' has no --rounding"):
        with_parameters(skip_method("ser"), {"rounding": "floor"})


@torch.no_grad()
def test_every_method_restores_the_model(opened, subject, masked):
    before = {name: p.clone() for name, p in opened.model.named_parameters()}
    step = opened.elastic.step
    for name in ("mask", *SKIPPING.split(",")):
        for named in method(name).points(subject):
            with opened.elastic.at(bind(opened.elastic, [named.point])):
                assert opened.elastic.step is not step
    assert opened.elastic.step is step
    assert WithoutFirst.entered
    assert all(torch.equal(p, before[name]) for name, p in opened.model.named_parameters())

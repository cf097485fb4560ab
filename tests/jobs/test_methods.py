"""The method protocol: names, what a candidate installs, the columns of its points, plain checkpoints."""

from contextlib import contextmanager

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.errors import UsageError
from moe_prism.options.frontier import FrontierOptions
from moe_prism.jobs.frontier import measure_frontier, subject_of
from moe_prism.jobs.skip import SkipOptions, make_plan
from moe_prism.methods.base import Candidate, Method, method, methods
from moe_prism.methods.skip.base import skip_method
from moe_prism.methods.skip.profile import losses, profile, refine, samples
from moe_prism.registry import Entry

SKIPPING = "uniform,pattern-skip,sensitivity,ser,naee,score-mass,weight-level,batch-redistribution:uniform"


def options(text_file, **changes):
    return FrontierOptions(text=str(text_file), tokens=128, length=32, calibration_tokens=128, **changes)


@pytest.fixture(scope="module")
def opened(tiny_source):
    return open_model(tiny_source)


@pytest.fixture
def subject(opened, text_file):
    return subject_of(opened, options(text_file))


class Masked(Method):
    """A stand-in for pruning: expert 0 is worth nothing while installed."""

    def candidates(self, subject):
        layer = subject.elastic.layers[0].plan.layer

        @contextmanager
        def without_first():
            before = layer.down[0].clone()
            layer.down[0].zero_()
            self.entered += 1
            try:
                yield
            finally:
                layer.down[0].copy_(before)

        self.entered = 0
        Masked.made = self
        return [Candidate(f"{self.name}-3", install=without_first, resident_share=0.75)]


@pytest.fixture
def masked(monkeypatch):
    monkeypatch.setitem(methods._builtin, "mask", Entry("tests.jobs.test_methods:Masked", "for this test"))


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
    assert Masked.made.entered == 1  # 128 tokens are one batch


def full_hidden(source):
    return open_model(source).elastic.layers[0].plan.layer.hidden


def stored(source):
    return open_model(source).elastic.stored_bytes_per_weight


def test_rules_and_skipping_together_on_an_elastic_folder(elastic_tiny, text_file, tmp_path):
    make_plan(elastic_tiny, "uniform", 1, text=str(text_file), tokens=128, length=32).save(tmp_path / "one.json")
    chosen = options(text_file, rules=("product",), methods=("product", "uniform"), plans=(str(tmp_path / "one.json"),))
    result = measure_frontier(elastic_tiny, chosen)
    assert [p.rule for p in result.points if p.rule != "product"] == ["uniform", "plan file"]
    one, uniform = (next(p for p in result.points if p.name == name) for name in ("one", "uniform-1"))
    assert one.kl == uniform.kl
    product = next(p for p in result.points if p.rule == "product" and p.budget < 1)
    assert product.resident_expert_bytes > uniform.resident_expert_bytes  # its predictor
    assert result.provenance["options"]["plans"] == ["one.json"]


@pytest.mark.parametrize(
    "name", ["best", "product:2", "uniform:2", "sensitivity:best", "pattern-skip:1-2", "pattern-skip:a-b-c-d", "ser:9", "naee:1"]
)
def test_what_is_no_method(subject, name):
    with pytest.raises(UsageError):
        method(name).candidates(subject)


def test_rules_with_predictors_need_sub_experts(tiny_source, text_file):
    with pytest.raises(UsageError, match="needs sub-experts"):
        measure_frontier(tiny_source, options(text_file, methods=("threshold",)))


def test_a_point_has_one_name(tiny_source, text_file, tmp_path):
    make_plan(tiny_source, "uniform", 1, text=str(text_file), tokens=128, length=32).save(tmp_path / "full.json")
    with pytest.raises(UsageError, match="two points are called 'full'"):
        measure_frontier(tiny_source, options(text_file, methods=("uniform",), plans=(str(tmp_path / "full.json"),)))


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
    plan = skip_method(f"sensitivity{variant}").finished(subject, 1.5)
    one, two = losses(subject, [(1, 2), (2, 1)])
    best = (1, 2) if one < two else (2, 1)
    assert plan.mean == 1.5 and sum(plan.layers) == 3
    if variant != ":isolated":
        assert plan.layers == best
    assert refine(subject, best[::-1]) == (best, pytest.approx(min(one, two)))


def test_samples_are_the_routing_weights(opened, subject):
    rows = samples(subject)
    assert [r.shape for r in rows] == [(128, 2)] * 2 and all((r.diff(dim=1) <= 0).all() for r in rows)
    assert opened.elastic.setting.routing is None and not opened.elastic.counting


def test_plans_record_how_they_were_made_and_what_they_cost(tiny_source, text_file):
    plan = make_plan(tiny_source, "ser", 1.5, SkipOptions(keep_mass=True), text=str(text_file), tokens=128, length=32)
    assert plan.keep_mass is True and plan.made["method"] == "ser" and plan.made["quality"]["kl"] > 0
    assert 1 <= plan.made["quality"]["experts_per_token"] <= 2 and plan.made["experts_per_token"] == 2


def test_pattern_knots_rounding_and_index(subject):
    make = skip_method("pattern-skip:2-1-1-2").plan
    assert make(subject, None, SkipOptions()).layers == (2, 1)
    assert make(subject, 2.0, SkipOptions()).layers == (2, 2)
    assert make(subject, None, SkipOptions(index_over="all")).layers == (2, 1)
    with pytest.raises(UsageError, match="needs a mean"):
        skip_method("sensitivity").plan(subject, None, SkipOptions())
    with pytest.raises(UsageError, match=r"cannot keep 1\.5"):
        skip_method("uniform").plan(subject, 1.5, SkipOptions())
    with pytest.raises(UsageError, match="gives no counts"):
        skip_method("weight-level:ser").plan(subject, 1.5, SkipOptions())


@torch.no_grad()
def test_every_method_restores_the_model(opened, subject, masked):
    before = {name: p.clone() for name, p in opened.model.named_parameters()}
    setting = opened.elastic.setting
    for name in ("mask", *SKIPPING.split(",")):
        for candidate in method(name).candidates(subject):
            with candidate.install():
                pass
    assert opened.elastic.setting is setting
    assert all(torch.equal(p, before[name]) for name, p in opened.model.named_parameters())

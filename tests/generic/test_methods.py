"""What every method of the catalogue must do, whatever it is: a new one is tested by being registered.

Neutral is exact; JSON round trip; the same KL when run again from frontier.json; alone = in a mixed batch; cost equals what was read.
"""

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.catalogue import methods
from moe_prism.compress.changes import change_of
from moe_prism.compress.prune import Criterion
from moe_prism.elastic import Rule
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost
from moe_prism.jobs.frontier import FrontierOptions, evaluation_windows, measure_frontier, subject_of
from moe_prism.methods.find import PRUNE, method
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule
from moe_prism.routing import routing_stages, stage_class

from .operations import counted, distinct_rows, expected

OPTIONS = {"tokens": 256, "length": 32, "calibration_tokens": 256, "points": 3}


def asked(name: str) -> str:
    """What a user writes to try a method."""
    found = methods.get(name)
    if issubclass(found, Criterion):
        return f"{PRUNE}:{name}"
    text = None if issubclass(found, Rule) else found.example()
    return name if text is None else f"{name}:{text}"


NAMES = [asked(name) for name in methods.names()]
PER_TOKEN = [asked(n) for act in ("slots", "routing") for n in methods.names(act)]


@pytest.fixture(scope="module")
def opened(elastic_tiny):
    torch.manual_seed(0)
    return open_model(elastic_tiny)


@pytest.fixture(scope="module")
def made(opened, text_file):
    """points(name): the points of a method on the tiny model, made once."""
    subject = subject_of(opened, FrontierOptions(text=str(text_file), **OPTIONS))
    known = {}

    def points(name):
        if name not in known:
            known[name] = list(method(name).points(subject))
        return known[name]

    return points


@torch.no_grad()
def logits(model, ids, step):
    with model._moe_prism.at(step):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_points_have_names_and_survive_json(made, name):
    points = made(name)
    assert points and len({p.name for p in points}) == len(points)
    for named in points:
        assert OperatingPoint.from_json(named.point.to_json()) == named.point
        assert named.point != FULL or named.point.is_full


@pytest.mark.parametrize("rule", methods.names("slots"))
def test_every_rule_is_exact_when_it_keeps_all(opened, rule):
    ids = distinct_rows(opened.model, 24)
    source = logits(opened.model, ids, [FULL])
    elastic = opened.elastic
    elastic.always_split = True
    try:
        found = logits(opened.model, ids, [OperatingPoint(slots=SlotRule(budget=1.0, rule=rule))])
    finally:
        elastic.always_split = False
    torch.testing.assert_close(found, source, rtol=1e-5, atol=1e-5 * float(source.abs().max()))


@pytest.mark.parametrize("name", [*routing_stages.names(), *(n for n in methods.names("routing") if methods.get(n).stage)])
def test_every_stage_is_exact_at_its_neutral_values(opened, name):
    elastic = opened.elastic
    neutral = stage_class(name).neutral(name, len(elastic.layers), elastic.k)
    assert RoutingStage.from_json(neutral.to_json()) == neutral
    ids = distinct_rows(opened.model, 24)
    assert torch.equal(logits(opened.model, ids, [OperatingPoint(routing=(neutral,))]), logits(opened.model, ids, [FULL]))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_request_gets_the_same_alone_and_beside_any_other(opened, made, name):
    """Beside points of other methods too, all rows of one batch."""
    if getattr(methods.get(name.partition(":")[0]), "depends_on_batch", False):
        pytest.skip("this method says that it depends on the batch")
    mine = [made(name)[0].point, made(name)[-1].point]
    others = [FULL, FULL.with_budget(0.5), made("uniform")[-1].point, made("product")[0].point]
    every = [*mine, *others]
    ids = distinct_rows(opened.model, 24 * len(every)).view(len(every), 24)
    which = torch.arange(len(every)).repeat_interleave(24)
    mixed = logits(opened.model, ids, Step(bind(opened.elastic, every), which))
    for row, point in enumerate(every):
        alone = logits(opened.model, ids[row : row + 1], [point])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
        assert torch.equal(mixed[row].argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize("name", PER_TOKEN)
@torch.no_grad()
def test_what_a_point_costs_is_what_it_reads(opened, made, name):
    """Per token, and of the batch together: bytes to the last one, FLOPs two per weight."""
    elastic, tokens = opened.elastic, 48
    ids = distinct_rows(opened.model, tokens)
    for named in (made(name)[0], made(name)[-1]):
        step = Step(bind(elastic, [named.point]))
        with elastic.at(step), counted(elastic) as found:
            elastic.reset_counters()
            opened.model(input_ids=ids)
            cost = measured_cost(elastic, step)
        per_token, distinct = expected(elastic, tokens, found)
        assert cost.active_expert_bytes == pytest.approx(per_token, rel=1e-12)
        assert cost.distinct_expert_bytes == pytest.approx(distinct, rel=1e-12)
        assert cost.flops_per_token == pytest.approx(2 * per_token / elastic.stored_bytes_per_weight, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(PRUNE)])
def test_a_change_of_weights_leaves_the_model_as_it_was(opened, made, name):
    ids = distinct_rows(opened.model, 24)
    before = logits(opened.model, ids, [FULL])
    for named in made(name):
        change = change_of(named.point.weights)
        assert change.part() == named.point.weights and 0 < change.resident_share < 1
        assert not torch.equal(logits(opened.model, ids, [named.point]), before)
        assert torch.equal(logits(opened.model, ids, [FULL]), before)


def test_a_measured_point_can_be_run_again_from_its_file(elastic_tiny, text_file, tmp_path):
    """All methods on one frontier, written, read and measured again: the same KL to 1e-9."""
    options = FrontierOptions(text=str(text_file), methods=tuple(NAMES), **OPTIONS)
    first = measure_frontier(elastic_tiny, options)
    first.save(tmp_path / "frontier.json")
    again = measure_frontier(
        elastic_tiny, FrontierOptions(text=str(text_file), given=(str(tmp_path / "frontier.json"),), **OPTIONS)
    )
    known = {p.name: p for p in [*again.points, *again.baseline_topk]}
    assert {p.name for p in first.points if not p.point.is_full} <= set(known)
    for p in [*first.points, *first.baseline_topk]:
        if not p.point.is_full:
            assert known[p.name].kl == pytest.approx(p.kl, abs=1e-9)
            assert known[p.name].active_expert_bytes == pytest.approx(p.active_expert_bytes, rel=1e-12)
    assert evaluation_windows(open_model(elastic_tiny), options).tokens >= 256

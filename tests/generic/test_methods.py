"""Every method of the catalogue passes the generic checks: a new one is tested by being registered."""

import pytest

from moe_prism.catalogue import methods
from moe_prism.routing import routing_stages

from . import checks

EACH = [(name, check) for name in methods.names() for check in checks.checks_of(name)]


@pytest.fixture(scope="module")
def bench(elastic_tiny, text_file):
    return checks.Bench(elastic_tiny, text_file)


@pytest.mark.parametrize(("name", "check"), EACH, ids=[f"{name}-{check.__name__}" for name, check in EACH])
def test_a_method(bench, name, check):
    check(bench, checks.asked_for(name))


@pytest.mark.parametrize("name", routing_stages.names())
def test_every_shared_stage_is_exact_at_its_neutral_values(bench, name):
    checks.is_exact_at_its_neutral_values(bench, name)


MEASURED = tuple(name for name in methods.names() if name not in methods.names("decoding"))
OF_A_KIND = ("threshold", "bits", "uniform", "top-p", "gate-threshold")
"""A rule, slots of several widths, a skip plan, a stage by token, and neurons left out; changes of weights are in the chains below."""


@pytest.mark.parametrize("names", [OF_A_KIND, pytest.param(MEASURED, marks=pytest.mark.slow)], ids=["of each kind", "all"])
def test_a_measured_point_can_be_run_again_from_its_file(bench, names, tmp_path):
    """All methods on one frontier."""
    checks.runs_again_from_its_file(bench, [checks.asked_for(name) for name in names], tmp_path / "frontier.json")


@pytest.mark.parametrize(
    "asked",
    [
        "heapr:0.75+rtn:4+threshold",
        "prune:hard-count+rtn:8+uniform",
        *(pytest.param(asked, marks=pytest.mark.slow) for asked in ("m-smoe:0.5+magnitude:0.75", "dern:0.5+rtn:4")),
    ],
)
def test_a_chain_is_one_point_with_one_price(bench, asked, tmp_path):
    """Edits, then skipping, then slots: what is told is what is counted, and it runs again from its file."""
    checks.has_points_that_survive_json(bench, asked)
    checks.changes_the_output(bench, asked)
    if "uniform" not in asked:  # the readable way asks for skipped experts too
        checks.costs_what_is_left_of_experts(bench, asked)
    checks.runs_again_from_its_file(bench, [asked], tmp_path / "frontier.json")

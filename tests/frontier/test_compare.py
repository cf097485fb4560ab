"""Rules compared over the whole curve."""

from dataclasses import replace

import pytest

from moe_prism.frontier import Frontier, MeasuredPoint, comparison


def point(rule, cost, kl, budget):
    return MeasuredPoint(f"{rule}-{cost}", rule, budget, 1.0, 2.0, kl, 1.0, 1.0, cost, 1.0, True)


def test_a_dominating_rule_has_more_volume_and_the_full_model_is_shared():
    good = [point("good", c, k, b) for c, k, b in ((50.0, 0.1, 0.5), (75.0, 0.02, 0.75), (100.0, 0.0, 1.0))]
    plain = [point("topk", c, k, b) for c, k, b in ((50.0, 0.4, 0.5), (75.0, 0.2, 0.75))]
    rows = {r.rule: r for r in comparison(Frontier("m", "s", 4, tuple(good), tuple(plain)))}
    assert rows["good"].hypervolume > rows["topk"].hypervolume
    assert rows["good"].points == rows["topk"].points == 3
    assert rows["topk"].cliff == 0.5
    # by hand: box 100 x .4; plain covers the strip right of 75 above .2
    assert abs(rows["topk"].hypervolume - (25 * 0.2) / 40) < 1e-12


def test_rules_are_compared_by_what_they_send_too():
    rows = [replace(point("a", 50.0, 0.1, 0.5), sends=3.0), replace(point("b", 50.0, 0.2, 0.5), sends=2.0)]
    rows.append(replace(point("a", 100.0, 0.0, 1.0), sends=4.0))
    found = {r.rule: r for r in comparison(Frontier("m", "s", 4, tuple(rows)))}
    assert found["a"].sends == pytest.approx((1 * 0.1) / 0.8), "by hand: box 4 x .2"
    assert found["b"].sends == 0, "it loses as much as anything does"


def test_without_a_full_point_there_is_nothing_to_compare():
    assert comparison(Frontier("m", "s", 4, (point("a", 1.0, 0.1, 0.5),))) == []

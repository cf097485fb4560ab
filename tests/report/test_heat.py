"""The heat map of experts: its numbers are the trace's, and it stays small for large models."""

from __future__ import annotations

import math

import pytest

from moe_prism.jobs.trace import shares
from moe_prism.offload.trace import load_trace
from moe_prism.report.heat import COLUMNS, by_layer, cells
from moe_prism.report.misses import render


def test_shares_are_those_of_the_trace():
    trace = load_trace("nano")
    found = shares(trace)
    assert len(found) == trace.layers and all(len(own) == trace.experts for own in found)
    assert all(sum(own) == pytest.approx(1) for own in found)
    row = trace.to_records()[5]
    total = sum(r["tokens"] for r in trace.to_records() if r["layer"] == row["layer"])
    assert found[row["layer"]][row["expert"]] == pytest.approx(row["tokens"] / total)


def test_the_table_says_how_even_a_layer_is():
    even, uneven, one = by_layer([[0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 1.0, 0]])
    assert even["as_many_as"] == pytest.approx(4) and even["unused"] == 0
    assert uneven["as_many_as"] == pytest.approx(2) and uneven["unused"] == 2
    assert (one["busiest"], one["share"], one["unused"]) == (2, 1.0, 3) and one["as_many_as"] == pytest.approx(1)


def test_many_experts_share_squares():
    own = [1 / 1000] * 1000
    found = cells([own])
    assert len(found) <= COLUMNS and found[-1]["last"] == 999
    assert all(math.isclose(row["times"], 1) for row in found)


def test_the_page_has_it():
    pytest.importorskip("altair")
    rows = [
        {"policy": name, "slots": slots, "hit_rate": 0.5, "loads_per_token": 2.0, "bound": name == "belady"}
        for name in ("lru", "belady")
        for slots in (2, 4)
    ]
    facts = {"model": "<m>", "tokens": 5, "k": 1, "experts": 4, "layers": 2}
    text = render(facts, [("experts", rows)], [[0.25] * 4, [1.0, 0, 0, 0]])
    assert "Which experts are used" in text and text.count("<figure") == 2 and "as many as" in text and "<m>" not in text

"""What the report says of slices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_prism.cli.frontier import show, show_slices
from moe_prism.frontier import Frontier, SliceScore
from moe_prism.report.html import render
from moe_prism.report.summary import judgement
from tests.report.test_html import Page


def scored(kept: float, *, ability: bool = True) -> SliceScore:
    return SliceScore(kept=kept, stderr=0.02, right=0.4 * kept, full=0.4, flips=0.031, items=500, is_ability=ability)


@pytest.fixture
def judged(frontier) -> Frontier:
    """Everything below the full model copies less and less; what greedy text says is another matter."""
    points = [
        replace(p, slices={"cloze": scored(0.97), "copy": scored(0.5 + p.budget / 2), "continuation": scored(0.1, ability=False)})
        for p in frontier.points
    ]
    return replace(
        frontier, points=tuple(points), provenance={**frontier.provenance, "judge": {"left_out": {"syntax": "no Python"}}}
    )


def test_the_worst_slice_is_an_ability_where_there_is_one(judged):
    point = next(p for p in judged.points if p.name == "product-8")
    assert point.worst_slice == "copy" and judged.baseline_topk[0].worst_slice is None
    only = replace(point, slices={"continuation": scored(0.1, ability=False), "routing": scored(0.9, ability=False)})
    assert only.worst_slice == "continuation"
    row = next(r for r in judged.to_records() if r["name"] == "product-8")
    assert row["worst_slice"] == "copy" and row["worst_slice_kept"] == 0.75
    assert Frontier.from_json(judged.to_json()) == judged


def test_the_report_names_the_failing_point_that_perplexity_shows_least(judged):
    failing = [p for p in judged.points if p.slices["copy"].kept < 0.9]
    full = next(p for p in judged.points if p.budget == 1)
    mildest = min(failing, key=lambda p: p.ppl / full.ppl)
    said = judgement(judged)
    assert f"{len(failing)} of {len(judged.points)} points keep less" in said and mildest.name in said
    assert f"{100 * (mildest.ppl / full.ppl - 1):+.1f}" in said and "slice 'copy'" in said
    fine = [replace(p, slices={"cloze": scored(0.95)}) for p in judged.points]
    assert "Every point keeps at least 90" in judgement(replace(judged, points=tuple(fine)))
    assert judgement(replace(judged, points=tuple(replace(p, slices={}) for p in judged.points))) == ""


def test_the_page_has_a_column_and_a_table_of_slices(judged, frontier):
    text = render(judged)
    rows = [row for row in Page(text).rows if row and row[0] == "product-8"]
    assert any("75.0" in cell for row in rows for cell in row) and any("97.0 ± 2.0" in cell for row in rows for cell in row)
    assert "By slice" in text and "Worst slice" in text and judgement(judged).split(";")[0] in text.replace("&#39;", "'")
    assert "slice" not in render(frontier).partition("<script")[0].lower()


def test_the_table_of_the_command_has_errors_and_flips(judged, frontier):
    assert "copy 75.0%" in show(judged) and "worst slice" not in show(frontier)
    said = show_slices(judged)
    assert "75.0 ± 2.0 (3.1)" in said and "not judged: syntax: no Python" in said

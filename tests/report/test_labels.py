"""Labels of points: none is written over another one, and the first keep their places."""

from __future__ import annotations

import random

import pytest

from moe_prism.report import chart
from moe_prism.report.labels import ABOVE, BELOW, SPOTS, Box, Label, place, position

FRAME = Box(0, 300, 0, 320)


def boxes(wanted, spots):
    return [spot.box(label.x, label.y, label.text) for label, spot in zip(wanted, spots, strict=True) if spot]


def test_alone_a_label_stands_where_it_is_wanted():
    assert place([Label(100, 100, "int4"), Label(200, 200, "K=8", BELOW)], FRAME, [], []) == [ABOVE, BELOW]


def test_a_label_that_would_touch_another_one_is_moved_or_left_out():
    first, second = Label(100, 100, "int4"), Label(140, 84, "K=8", BELOW)
    assert boxes([first], [ABOVE])[0].meets(boxes([second], [BELOW])[0])
    spots = place([first, second], FRAME, [], [])
    assert spots[0] == ABOVE and spots[1] not in (None, BELOW)
    walls = [Box(0, 300, 0, 320)]
    assert place([second], FRAME, [], walls) == [None]


def test_a_label_stays_in_the_frame_and_off_markers_where_it_can():
    assert place([Label(295, 100, "int4")], FRAME, [], [])[0].align == "right"
    assert place([Label(100, 100, "int4")], FRAME, [(100, 100), (115, 90)], []) == [BELOW]


def test_a_label_stays_off_lines_where_it_can():
    falls = [(60, 60), (240, 110)]  # as the plain model's does, through what would stand above right
    assert place([Label(100, 92, "K=7.66")], FRAME, [(100, 92)], [], [falls]) == [BELOW]
    everywhere = [[(0, y), (300, y)] for y in range(0, 320, 8)]
    assert place([Label(100, 92, "K=7.66")], FRAME, [(100, 92)], [], everywhere) == [ABOVE]


def test_no_two_of_many_overlap():
    draw = random.Random(0)
    left_out = 0
    for _ in range(200):
        wanted = [
            Label(draw.uniform(0, 300), draw.uniform(0, 320), draw.choice(["top-2", "int4", "K=12.5"]), draw.choice(SPOTS))
            for _ in range(9)
        ]
        spots = place(wanted, FRAME, [(w.x, w.y) for w in wanted], [])
        found = boxes(wanted, spots)
        assert not any(a.meets(b) for i, a in enumerate(found) for b in found[:i])
        left_out += spots.count(None)
    assert left_out < 200  # a few of a thousand and eight hundred


def test_positions_are_those_of_the_scales():
    assert position(5, {"domain": [0, 10]}, 300) == 150
    assert position(0.1, {"type": "log", "domain": [0.01, 1]}, 300) == pytest.approx(150)


@pytest.mark.parametrize("width", [chart.WIDE, chart.NARROW])
def test_the_labels_of_a_frontier_do_not_touch(frontier, width, monkeypatch):
    seen = []

    def told(wanted, *more):
        seen.append((wanted, place(wanted, *more)))
        return seen[-1][1]

    monkeypatch.setattr(chart, "place", told)
    for made in (chart.kl_chart(frontier, width), chart.ppl_chart(frontier, width)):
        texts = [layer for layer in made.to_dict()["layer"] if layer["mark"]["type"] == "text"]
        assert len(texts) == len(SPOTS) + 1  # one for each spot, and the note
    for wanted, spots in seen:
        assert {label.text for label, spot in zip(wanted, spots, strict=True) if spot} >= {"top-1", "top-2"}
        found = boxes(wanted, spots)
        assert not any(a.meets(b) for i, a in enumerate(found) for b in found[:i])

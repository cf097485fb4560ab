"""Deadlines of an engine: the next one first, and none that nobody waits for any more."""

from __future__ import annotations

import random

from moe_prism.serve.engine.deadlines import FEW, Deadlines


def test_those_that_passed_come_in_order_and_the_others_stay():
    running = {"a", "b", "c"}
    deadlines = Deadlines(running)
    for name, at in (("b", 2.0), ("c", 3.0), ("a", 1.0)):
        deadlines.add(at, name)
    assert list(deadlines.passed(0.5)) == [] and list(deadlines.passed(2.0)) == ["a", "b"]
    assert len(deadlines) == 1 and list(deadlines.passed(9.0)) == ["c"]


def test_requests_that_ended_long_before_theirs_leave_nothing_behind():
    draw, running = random.Random(0), set[str]()
    deadlines = Deadlines(running)
    for number in range(10_000):
        running.add(str(number))
        deadlines.add(draw.random(), str(number))
        if len(running) > 8:
            running.remove(draw.choice(sorted(running)))
    assert len(deadlines) <= FEW + 1
    assert running <= set(deadlines.passed(1.0))

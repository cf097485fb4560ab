"""How long a draft is: what is chosen follows from what was measured, and nothing else."""

from itertools import pairwise

import pytest

from moe_prism.methods.decode.pace import AGAIN, FIRST, SELDOM, Pace


def told(pace, kept, plain, draft, per_check):
    """Let a pace measure a machine that always takes so long. kept: of every draft of 4; per_check(n)."""
    for _ in range(FIRST):
        assert pace.choose() == 0
        pace.plain(plain)
    for _ in range(FIRST):
        n = pace.choose()
        assert n == 4
        pace.drafted(draft)
        pace.checked(n, per_check(n))
        pace.outcome(n, kept)
    return pace


def test_it_drafts_where_checks_cost_little_and_guesses_are_right():
    pace = told(Pace(4), 4, 1.0, 0.2, lambda n: 1.1)
    assert pace.choose() == 4 and pace.rate(4) > 2


def test_it_drafts_nothing_where_a_check_costs_as_much_as_its_tokens():
    pace = told(Pace(4), 4, 1.0, 0.3, lambda n: n + 1.0)
    assert pace.choose() == 0


def test_it_drafts_nothing_where_guesses_are_wrong():
    assert told(Pace(4), 0, 1.0, 0.2, lambda n: 1.1).choose() == 0


def test_a_short_draft_wins_where_late_guesses_are_wrong():
    pace = told(Pace(4), 1, 1.0, 0.25, lambda n: 1 + 0.05 * n)
    rates = {n: pace.rate(n) for n in range(5)}
    assert pace.choose() == max(rates, key=rates.get) in (1, 2)


def test_it_looks_again_after_a_while_and_changes_its_mind():
    pace = told(Pace(4), 0, 1.0, 0.2, lambda n: 1.1)
    tries = 0
    for _ in range(12 * AGAIN):
        n = pace.choose()
        if n == 0:
            pace.plain(1.0)
        else:
            tries += 1
            pace.drafted(0.2)
            pace.checked(n, 1.1)
            pace.outcome(n, n)  # now every guess is right
    assert pace.choose() > 0 and tries > 1


def test_looking_again_costs_fewer_and_fewer_rounds_where_drafts_lose():
    pace = told(Pace(4), 0, 1.0, 0.2, lambda n: 1.1)
    at = []
    for step in range(100 * AGAIN):
        if n := pace.choose():
            at.append(step)
            pace.drafted(0.2)
            pace.checked(n, 1.1)
            pace.outcome(n, 0)
        else:
            pace.plain(1.0)
    apart = [b - a for a, b in pairwise(at)]
    assert apart == sorted(apart) and apart[0] >= 2 * AGAIN and max(apart) <= SELDOM + 1
    assert len(at) <= 8


def test_plain_steps_are_measured_again_while_it_drafts():
    pace = told(Pace(4), 4, 1.0, 0.2, lambda n: 1.1)
    plain = 0
    for _ in range(10 * AGAIN):
        if n := pace.choose():
            pace.drafted(0.2)
            pace.checked(n, 1.1)
            pace.outcome(n, n)
        else:
            plain += 1
            pace.plain(1.0)
    assert 3 <= plain <= 4


def test_seconds_of_a_check_lie_on_a_line_between_what_was_measured():
    pace = told(Pace(4), 4, 1.0, 0.2, lambda n: 3.0)
    assert pace.rate(2) == pytest.approx(3 / (0.4 + 2.0), rel=0.01)

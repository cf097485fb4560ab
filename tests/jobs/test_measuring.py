"""Where a frontier is measured."""

import itertools

import pytest

from moe_prism.errors import UsageError
from moe_prism.methods.slots.rules import grid
from moe_prism.options.frontier import FrontierOptions


def test_a_continuous_rule_gets_points_of_equal_cost_ratio_with_exact_ends():
    counts = grid(range(3, 17), 40, overhead=0.7)
    assert len(counts) == 40 and counts[0] == 3 and counts[-1] == 16
    ratios = [(b + 0.7) / (a + 0.7) for a, b in itertools.pairwise(counts)]
    assert max(ratios) - min(ratios) < 1e-9


def test_a_counting_rule_is_measured_at_every_count():
    assert grid(range(3, 17), None, overhead=0.7) == list(range(3, 17))


def test_one_point_is_no_curve():
    with pytest.raises(UsageError, match="--per-method 1 is too small"):
        FrontierOptions(per_method=1).check()

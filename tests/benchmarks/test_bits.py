"""What benchmarks/bits.py makes of measured points: KL at a share, and the closest row within it."""

from __future__ import annotations

import math

import pytest

from benchmarks.bits import BARS, Seen, at, show, within

CURVE = [Seen("", 0.4, 0.01), Seen("", 0.1, 1.0), Seen("", 0.2, 0.1)]


def test_kl_lies_on_the_line_of_its_logarithm_and_never_beyond_it():
    assert at(0.2, CURVE) == pytest.approx(0.1)
    assert at(0.3, CURVE) == pytest.approx(math.sqrt(0.1 * 0.01))
    assert at(0.05, CURVE) == at(0.5, CURVE) == math.inf


def test_the_closest_row_reads_no_more_than_the_share():
    assert within(0.25, CURVE).share == 0.2 and within(0.05, CURVE).kl == math.inf


def test_a_row_says_whether_its_bar_is_met():
    row = {"model": "nano", "domain": "python", "share": 0.25, "blocks": 0.1, "bits": 0.05, "bits_name": "rtn 3, 32"}
    row |= {"pair_name": "pair 4", "pair": 0.02, "slots": 0.01, "ratio": 0.2, "bar": BARS[0.25], "to_pair": 0.5}
    assert "met" in show(row) and "MISSED" in show(row | {"ratio": 0.3})

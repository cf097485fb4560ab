"""What benchmarks/bits.py makes of measured points: KL at a share, and the closest row within it."""

from __future__ import annotations

import math

import pytest


@pytest.fixture
def bits(script):
    return script("bits")


@pytest.fixture
def curve(bits):
    return [bits.Seen("", 0.4, 0.01), bits.Seen("", 0.1, 1.0), bits.Seen("", 0.2, 0.1)]


def test_kl_lies_on_the_line_of_its_logarithm_and_never_beyond_it(bits, curve):
    assert bits.at(0.2, curve) == pytest.approx(0.1)
    assert bits.at(0.3, curve) == pytest.approx(math.sqrt(0.1 * 0.01))
    assert bits.at(0.05, curve) == bits.at(0.5, curve) == math.inf


def test_the_closest_row_reads_no_more_than_the_share(bits, curve):
    assert bits.within(0.25, curve).share == 0.2 and bits.within(0.05, curve).kl == math.inf


def test_a_row_says_whether_its_bar_is_met(bits):
    row = {"model": "nano", "domain": "python", "share": 0.25, "blocks": 0.1, "bits": 0.05, "bits_name": "rtn 3, 32"}
    row |= {"pair_name": "pair 4", "pair": 0.02, "slots": 0.01, "ratio": 0.2, "bar": bits.BARS[0.25], "to_pair": 0.5}
    assert "met" in bits.show(row) and "MISSED" in bits.show(row | {"ratio": 0.3})

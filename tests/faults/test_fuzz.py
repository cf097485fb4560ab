"""X05: every parser, on seeds, on what once broke it, and on random changes of both. `make fuzz` looks further, led by coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.run import kept
from tests.fuzz.targets import SEEDS, TARGETS, check


@pytest.mark.parametrize("name", TARGETS)
def test_x05_what_once_broke_a_parser_does_no_more(name):
    for data in [*SEEDS[name], *kept(name)]:
        check(name, data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_x05_a_parser_returns_or_says_one_line(name, data):
    seed = data.draw(st.sampled_from(SEEDS[name]))
    at, length = data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, 8))
    check(name, seed[:at] + data.draw(st.binary(max_size=12)) + seed[at + length :])
    check(name, data.draw(st.binary(max_size=200)))

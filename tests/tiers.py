"""Which parameters of a test run with every commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def by_night(values: Iterable[Any], *commit: Any) -> list[ParameterSet]:
    """Parameters of which those of `commit` run with every commit and the others by night: they ask the same of another of the kind.

    A value that is a tuple holds several parameters. LookupError for a commit's that is none of them.
    """
    every = list(values)
    if missing := [value for value in commit if value not in every]:
        raise LookupError(f"{missing} is none of {every}")
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if v in commit else pytest.mark.slow) for v in every]

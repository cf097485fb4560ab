"""What other packages register, for tests: no package has to be installed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from moe_prism import registry


class EntryPoint:
    """Of a class in a test's own module."""

    dist = None

    def __init__(self, name: str, thing: type) -> None:
        self.name, self.value = name, f"{thing.__module__}:{thing.__name__}"


def plug_in(monkeypatch: pytest.MonkeyPatch, things: Mapping[str, Mapping[str, type]]) -> None:
    """{group: {name: class}}, and nothing else."""
    points = {group: [EntryPoint(name, thing) for name, thing in own.items()] for group, own in things.items()}
    monkeypatch.setattr(registry, "entry_points", lambda group: points.get(group, []))

"""The registry: lazy, cached, helpful."""

import pytest

from moe_prism import registry
from moe_prism.errors import UsageError
from moe_prism.registry import Registry

NAMES = Registry("thing", {"join": ("os.path:join", "paths"), "dumps": ("json:dumps", "text")})


def test_names_resolve_and_are_looked_up_once(monkeypatch):
    import json

    assert NAMES.get("dumps") is json.dumps
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("looked for plug-ins again"))
    assert NAMES.get("dumps") is json.dumps


def test_an_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(UsageError, match="unknown thing 'joins'; did you mean 'join'\\? choose one of: join, dumps"):
        NAMES.get("joins")


def test_a_plug_in_adds_a_name_and_cannot_replace_one(monkeypatch):
    class Point:
        dist = None

        def __init__(self, name, value):
            self.name, self.value = name, value

    points = [Point("join", "json:loads"), Point("loads", "json:loads")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "moe_prism.thing" else [])
    fresh = Registry("thing", {"join": ("os.path:join", "paths")})
    import json
    import os.path

    assert fresh.get("loads") is json.loads
    assert fresh.get("join") is os.path.join
    assert fresh.entries()["loads"].origin == "unknown"

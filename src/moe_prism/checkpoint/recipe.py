"""The recipe that is being run, for the manifests of what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_running: ContextVar[Mapping[str, Any] | None] = ContextVar("recipe", default=None)


@contextmanager
def recorded_recipe(resolved: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every output says that this recipe, defaults filled in, made it."""
    token = _running.set(resolved)
    try:
        yield
    finally:
        _running.reset(token)


def recipe_facts() -> dict[str, Any]:
    """{"recipe": ...} inside `recorded_recipe`, else nothing."""
    found = _running.get()
    return {} if found is None else {"recipe": dict(found)}

"""Versions of this tool and of the libraries that decide the bytes it writes."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

LIBRARIES = ("moe-prism", "torch", "transformers", "safetensors", "numpy", "scipy", "numba")


def versions() -> dict[str, str]:
    """By the names under which they are installed."""
    return dict(_found())


@cache
def _found() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}

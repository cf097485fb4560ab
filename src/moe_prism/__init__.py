"""moe-prism makes Mixture-of-Experts language models elastic: the same weights at any price between cheap and full quality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import calibrate_model, generate, inspect_model, load, measure_frontier, recover_model, refactor, verify
    from .elastic import operating_point
    from .errors import CorruptError, DoesNotFit, PrismError, UsageError

_HOME = {
    "calibrate_model": "api",
    "measure_frontier": "api",
    "generate": "api",
    "inspect_model": "api",
    "load": "api",
    "recover_model": "api",
    "refactor": "api",
    "verify": "api",
    "operating_point": "elastic",
    "CorruptError": "errors",
    "DoesNotFit": "errors",
    "PrismError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "CorruptError",
    "DoesNotFit",
    "PrismError",
    "UsageError",
    "__version__",
    "calibrate_model",
    "generate",
    "inspect_model",
    "load",
    "measure_frontier",
    "operating_point",
    "recover_model",
    "refactor",
    "verify",
]


def __dir__() -> list[str]:
    return [*globals(), *_HOME]  # so that tab completion knows what has not been imported yet


def __getattr__(name: str) -> Any:
    """Import on first use: `moe-prism --help` must not pay for torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

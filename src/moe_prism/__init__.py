"""moe-prism makes Mixture-of-Experts language models elastic: the same weights at any price between cheap and full quality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .artefact.load import load
    from .elastic import operating_point
    from .errors import CorruptError, DoesNotFit, PrismError, UsageError
    from .jobs.calibrate import calibrate_model
    from .jobs.frontier import measure_frontier
    from .jobs.generate import generate
    from .jobs.inspect import inspect_model
    from .jobs.recover import recover_model
    from .jobs.refactor import refactor
    from .jobs.verify import verify

_HOME = {
    "calibrate_model": "jobs.calibrate",
    "measure_frontier": "jobs.frontier",
    "generate": "jobs.generate",
    "inspect_model": "jobs.inspect",
    "load": "artefact.load",
    "recover_model": "jobs.recover",
    "refactor": "jobs.refactor",
    "verify": "jobs.verify",
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

"""Sub-expert selection and execution: scorers, rules, and the runtime that installs them on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use

if TYPE_CHECKING:
    from .base import LayerParts, Rule, Scorer, Slots
    from .runtime import Elastic, attach, operating_point

__getattr__ = on_use(__name__, {"base": "LayerParts Rule Scorer Slots", "runtime": "Elastic attach operating_point"})

__all__ = ["Elastic", "LayerParts", "Rule", "Scorer", "Slots", "attach", "operating_point"]

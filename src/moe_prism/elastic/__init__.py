"""Sub-expert selection and execution: scorers, rules, and the runtime that installs them on a model."""

from .base import LayerParts, Rule, Scorer, Slots
from .runtime import Elastic, attach, operating_point

__all__ = ["Elastic", "LayerParts", "Rule", "Scorer", "Slots", "attach", "operating_point"]

"""Experts in fewer bits as a change of weights: decoded in place, priced as they would be stored."""

from .change import QuantizeChange

__all__ = ["QuantizeChange"]

"""Experts in fewer bits as a change of weights: decoded in place, priced as they would be stored."""

from typing import TYPE_CHECKING

from ...lazy import on_use

if TYPE_CHECKING:
    from .change import QuantizeChange

__getattr__ = on_use(__name__, {"change": "QuantizeChange"})

__all__ = ["QuantizeChange"]

"""One training loop for every architecture: Muon and AdamW by steps, with states that an interrupted run goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use

if TYPE_CHECKING:
    from .loop import Curve, Training
    from .muon import Muon, learning_rate

__getattr__ = on_use(__name__, {"loop": "Curve Training", "muon": "Muon learning_rate"})

__all__ = ["Curve", "Muon", "Training", "learning_rate"]

"""Experts in the order of their numbers, and the first ones once more in the spare slots: how vLLM starts."""

from __future__ import annotations

import numpy as np

from .base import Cluster, Demand, ExpertPlacement


def contiguous(demand: Demand, room: Cluster) -> ExpertPlacement:
    """Looks at nothing."""
    layers, experts, _ = demand.blocks.shape
    row = np.arange(experts + room.spare) % experts
    return ExpertPlacement(np.tile(row, (layers, 1)), room.devices)

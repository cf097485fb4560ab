"""What a recovery method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..elastic import Elastic


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """An elastic model in memory, calibration windows, and a place for finished parts of the work.

    `done(layer)` and `save(layer, tensors)` journal the side tensors of a layer, so that a killed run need not fit it again.
    """

    model: Any
    elastic: Elastic
    ids: Tensor  # [n, length]
    sensitivity: Sequence[float] | None  # per layer, as `refactor` measured it
    bands: int
    steps: int
    memory_bytes: int
    seed: int
    done: Callable[[int], bool]
    save: Callable[[int, dict[str, Tensor]], None]
    report: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


Method = Callable[[RecoverJob], dict[str, Any]]
"""Saves side tensors of every layer and returns facts for prism.json."""

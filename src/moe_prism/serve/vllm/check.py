"""Refuse bad request fields while there is still somebody to answer 400 to."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import PrismError
from . import compat
from .levels import Menu
from .wiring import FOLDER, POINTS


@cache
def menu_of(folder: str, points: str) -> Menu:
    """The levels that names are checked against, of the points that are named in a JSON list; defaults do not matter here."""
    return Menu.of(Path(folder), {"points": json.loads(points)})


class FieldCheck(compat.name("LogitsProcessor")):  # type: ignore[misc]
    """A logits processor that leaves the logits alone: vLLM's way to look at a request's extra fields before it is admitted."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with 400."""
        folder = os.environ.get(FOLDER)
        if folder and sampling_params.extra_args:
            try:
                menu_of(folder, os.environ.get(POINTS, "[]")).read(sampling_params.extra_args)
            except PrismError as error:
                raise ValueError(str(error)) from error

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Nothing is kept."""

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the batch."""

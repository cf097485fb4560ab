"""Refuse bad request fields while there is still somebody to answer 400 to."""

from __future__ import annotations

from typing import Any

from . import compat
from .whole import check


class FieldCheck(compat.name("LogitsProcessor")):  # type: ignore[misc]
    """A logits processor that leaves the logits alone: vLLM's way to look at a request's extra fields before it is admitted."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with 400."""
        check(sampling_params.extra_args or {})

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Nothing is kept."""

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the batch."""

"""What a request to a pool says: the limits that it names, and the text that it asks about. All else goes to the upstream as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StrictBool, StrictStr

from ..http.refusal import Refusal
from ..http.values import Quality, TpotMs, TtftMs, without_nulls
from .options import Choice, RequestLimits

OURS = ("quality", "min_quality", "ttft_ms", "tpot_ms", "class", "self_draft")
"""Fields that no upstream but our own server knows."""
ROUTED = ("quality", "min_quality")


class RouteRequest(BaseModel):
    """A body of either endpoint."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    model: StrictStr | None = Field(default=None, max_length=256)
    stream: StrictBool = False
    quality: Quality | None = None
    min_quality: Quality | None = None
    ttft_ms: TtftMs | None = None
    tpot_ms: TpotMs | None = None

    @classmethod
    def of(cls, data: Any) -> RouteRequest:
        """From JSON; null is left out."""
        made = cls.model_validate(without_nulls(data))
        made._sent = dict(without_nulls(data))  # type: ignore[call-overload]
        return made

    def wanted(self, pool: str, names: Mapping[str, Any]) -> RequestLimits:
        """What it names. names: of the models. Refusal for a model that there is not, and for qualities that contradict each other."""
        model, _, behind = (self.model or pool).partition("@")
        if model != pool and model not in names:
            raise Refusal(404, f"there is no model '{model[:64]}'", param="model", code="model_not_found")
        quality = self.quality
        if behind:
            if quality is not None:
                raise Refusal(400, "the model's name and quality both ask for a quality", param="quality")
            quality = _number(behind)
        if isinstance(self.min_quality, str):
            raise Refusal(400, "give min_quality as a number: levels of several models have no one order", param="min_quality")
        if isinstance(quality, str) and self.min_quality is not None:
            raise Refusal(400, "quality names a level, which min_quality cannot lower", param="min_quality")
        if isinstance(quality, float | int) and self.min_quality is not None and self.min_quality > quality:
            raise Refusal(400, "min_quality is above quality", param="min_quality")
        level = quality if isinstance(quality, str) else None
        floor = self.min_quality if self.min_quality is not None else quality if level is None and quality is not None else 0.0
        ttft, tpot = (None if ms is None else ms / 1e3 for ms in (self.ttft_ms, self.tpot_ms))
        fixed = quality is not None and self.min_quality is None
        return RequestLimits(None if model == pool else model, float(floor), level, ttft, tpot, fixed)

    def text(self) -> str:
        """What it asks about: the prompt, or the last message."""
        found = self._sent.get("prompt")
        if found is None:
            messages = self._sent.get("messages")
            last = messages[-1] if isinstance(messages, list) and messages else None
            found = last.get("content") if isinstance(last, dict) else None
        if isinstance(found, list):
            found = "\n".join(part if isinstance(part, str) else _part(part) for part in found[:64])
        return found if isinstance(found, str) else ""

    def body(self, choice: Choice) -> tuple[bytes, list[str]]:
        """(the body for an option's upstream, fields that have no effect there). Refusal for what JSON cannot say."""
        upstream = choice.upstream
        sent = {name: value for name, value in self._sent.items() if name not in ROUTED}
        sent["model"] = upstream.model
        ignored: list[str] = []
        if upstream.is_ours:
            sent["quality"] = choice.option.level
            if choice.lowest is not None:
                sent["min_quality"] = choice.lowest
        else:
            ignored = [name for name in OURS if name in sent and name not in ("ttft_ms", "tpot_ms")]
            sent = {name: value for name, value in sent.items() if name not in OURS}
        try:
            return json.dumps(sent, allow_nan=False).encode(), ignored
        except (ValueError, RecursionError, UnicodeEncodeError):
            raise Refusal(
                400, "body: it holds a number that is not finite, or is nested too deeply", code="invalid_json"
            ) from None


def _number(text: str) -> float | str:
    try:
        found = float(text)
    except ValueError:
        return text[:64]
    if not 0 <= found <= 1:
        raise Refusal(400, "a quality is from 0 to 1", param="model")
    return found


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""

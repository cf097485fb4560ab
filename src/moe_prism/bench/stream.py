"""From the bytes of one streamed completion to its Outcome."""

from __future__ import annotations

import json
from typing import Any

from .http import Broken, ResponseReader
from .outcome import FAILED, OK, REFUSED, Outcome
from .target import message

KEPT = 2048  # bytes of an answer that is no stream, for its message


class Stream:
    """Hears the parts of one answer. `zero` is the clock's reading when the run began."""

    def __init__(self, outcome: Outcome, zero: float) -> None:
        self.outcome, self._zero = outcome, zero
        self._line = bytearray()
        self._kept = bytearray()
        self._finished = self._counted = False

    def hear(self, now: float, part: bytes) -> None:
        """A part of the body that came at `now`."""
        self._kept += part[: KEPT - len(self._kept)]
        self._line += part
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._event(now - self._zero, bytes(line[5:]).strip())

    def close(self, reader: ResponseReader, error: Exception | None = None) -> None:
        """The answer ended, with an error of the connection or without."""
        o = self.outcome
        if reader.status and reader.status != 200:
            o.status = REFUSED if reader.status in (429, 503) else FAILED
            o.detail = f"{reader.status}: {message(bytes(self._kept))}"
        elif o.status == FAILED:
            return  # an error in the stream
        elif error is not None or not self._finished:
            o.status, o.detail = FAILED, str(error) if isinstance(error, Broken) else "the stream ended without a finish"
        else:
            o.status = OK
            o.tokens = o.tokens if self._counted else len(o.events)

    def _event(self, now: float, data: bytes) -> None:
        o = self.outcome
        if data == b"[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            o.status, o.detail = FAILED, "an event that is no JSON"
            return
        if "error" in chunk:
            o.status, o.detail, o.end = FAILED, message(data), now
            return
        for choice in chunk.get("choices") or ():
            finish = choice.get("finish_reason")
            if choice.get("text") or (finish and not o.events):  # an answer may be all tokens without text
                o.events.append(now)
            if finish:
                self._finished, o.end = True, now
        if chunk.get("usage"):
            self._counted = True
            o.tokens, o.prompt = int(chunk["usage"]["completion_tokens"]), int(chunk["usage"]["prompt_tokens"])
        if chunk.get("moe_prism"):
            self._served(chunk["moe_prism"])

    def _served(self, served: dict[str, Any]) -> None:
        if served.get("quality") is not None:
            self.outcome.quality = float(served["quality"])
            self.outcome.computed = sum(served.get("tokens", {}).values())

"""What a recording of routing is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .base import Options, option
from .text import DEFAULT_TEXT, FIELDS, SOURCES, check_there, text_source


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Options):
    """Which text is run, how it is cut into requests, and what is kept of it.

    >>> import moe_prism
    >>> moe_prism.TraceOptions(budget=0.5).tokens
    8192
    """

    answers: Path | None = option(
        None,
        "Run nothing: take the routing from answers of vLLM or SGLang with routed_experts, one JSON answer per line. The model says which "
        "layers and experts those are.",
    )
    text: str | None = option(None, f"{SOURCES}. Both of its sides are recorded, and marked. {DEFAULT_TEXT}")
    text_field: list[str] = option([], FIELDS)
    tokens: int = option(8192, "Tokens in all.", least=1)
    length: int = option(256, "Tokens per request.", least=8)
    prompt: int = option(64, "How many of them are the prefill step; the others are one decode step each.", least=0)
    budget: float = option(
        1.0, "Share of the bytes that a token of an elastic model reads, in (0, 1]; of its slots for other rules than threshold."
    )
    rule: str | None = option(None, "Selection rule of an elastic model; see `moe-prism ls methods`. Default threshold.")
    inputs: bool = option(False, "Also keep the routers' inputs and weights, which cross-layer prediction needs.")
    values: bool = option(False, "Also keep the value of every candidate slot of an elastic model.")

    def check(self) -> None:
        super().check()
        if self.text is not None:
            check_there(text_source(self.text, self.text_field))
        alone = TraceOptions(answers=self.answers)
        if self.answers is not None and self != alone:
            raise UsageError("--answers takes everything from the answers", "leave the other options out")
        if self.prompt >= self.length:
            raise UsageError(f"--prompt {self.prompt} leaves nothing to decode of {self.length} tokens", "give a longer --length")

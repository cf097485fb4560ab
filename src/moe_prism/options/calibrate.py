"""What a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, option
from .text import DOMAINS, FIELDS, SOURCES, TextSource, text_source


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """The text of a calibration pass, and what is kept of it."""

    text: str = option("stdlib", f"Calibration text: {SOURCES}. Its evaluation side is never used.")
    text_field: list[str] = option([], FIELDS)
    domains: list[str] = option([], f"{DOMAINS}, and statistics of each beside those of all.", flag="domain", is_repeated=True)
    tokens: int = option(65_536, "Calibration tokens.", least=1)
    length: int = option(512, "Tokens per window.", least=8)
    reservoir: int = option(2048, "Sampled tokens kept per expert.", least=64)
    memory_mib: int = option(4096, "Limit for all statistics together; the reservoir shrinks to fit.", least=1)
    seed: int = option(0, "Seed of the sample.", least=0)
    low_memory: bool = option(False, "Keep one decoder layer in memory at a time.")
    collectors: list[str] = option(
        ["counts", "tokens"],
        "Comma-separated statistics to keep; see `moe-prism ls collectors`. refactor reads counts and tokens.",
        names="moe_prism.calibrate:collectors",
    )

    def check(self) -> None:
        super().check()
        if not self.collectors:
            raise UsageError("--collectors names none", "refactor needs counts,tokens")
        self.source  # noqa: B018 - raises for what cannot be meant together

    @property
    def source(self) -> TextSource:
        """What --text, --text-field and --domain name."""
        return text_source(self.text, self.text_field, self.domains)

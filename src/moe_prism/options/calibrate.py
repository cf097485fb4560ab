"""What a calibration is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .base import Options, option
from .text import DEFAULT_TEXT, DOMAINS, FIELDS, SOURCES, TextSource, check_there, named_parts, text_source

ANSWER_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """The text of a calibration pass, and what is kept of it.

    >>> import moe_prism
    >>> moe_prism.CalibrateOptions(text="domains", tokens=65536).length
    512
    """

    text: str | None = option(None, f"Calibration text: {SOURCES}. Its evaluation side is never used. {DEFAULT_TEXT}")
    text_field: list[str] = option([], FIELDS)
    domains: list[str] = option([], f"{DOMAINS}, and statistics of each beside those of all.", flag="domain", is_repeated=True)
    tasks: list[str] = option(
        [],
        "FILE of prompts, rows or lines, instead of --text: the model answers them first, and is calibrated on both. NAME=FILE once per "
        "domain.",
        is_repeated=True,
    )
    answer_tokens: int = option(ANSWER_TOKENS, "Of --tasks: most tokens of an answer.", least=1)
    temperature: float = option(0.0, "Of --tasks: how answers are drawn; 0 is greedy.", least=0, below=math.inf)
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
        if self.text is not None or self.domains or self.tasks:
            check_there(self.source)

        if not self.tasks and (self.answer_tokens, self.temperature) != (ANSWER_TOKENS, 0.0):
            raise UsageError(
                "--answer-tokens and --temperature belong to --tasks", "name a file of prompts with --tasks, or leave them out"
            )
        if self.tasks and self.low_memory:
            raise UsageError(
                "--tasks with --low-memory would read the model from disk for every token",
                "answer the tasks elsewhere, and give prompts and completions with --text",
            )

    def _task_source(self) -> TextSource:
        if self.domains or self.text is not None:
            raise UsageError(
                "--tasks stands instead of --text and --domain", "give one of them; --tasks NAME=FILE names a domain"
            )
        if len(self.tasks) == 1 and ("=" not in self.tasks[0] or Path(self.tasks[0]).exists()):
            return TextSource((("", self.tasks[0]),), tuple(self.text_field))
        return TextSource(named_parts(self.tasks, "--tasks"), tuple(self.text_field))

    @property
    def named_domains(self) -> tuple[str, ...]:
        """The names of the domains, also where the text is not settled yet."""
        return self.source.domains if self.text is not None or self.domains or self.tasks else ()

    @property
    def source(self) -> TextSource:
        """What --text, --text-field and --domain name, or --tasks."""
        if self.tasks:
            return self._task_source()
        return text_source(self.text, self.text_field, self.domains)

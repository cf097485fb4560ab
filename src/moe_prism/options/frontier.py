"""What a measurement of operating points is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import LOW_MEMORY_WORDS, Options, option
from .text import DEFAULT_TEXT, DOMAINS, FIELDS, SOURCES, TextSource, check_there, text_source


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(Options):
    """Which points are measured, and on which text. Without rules, methods and given points: the rule `product`.

    >>> import moe_prism
    >>> moe_prism.FrontierOptions(methods=("threshold", "uniform")).tokens
    16384
    """

    rules: tuple[str, ...] = option(
        (),
        "Comma-separated selection rules to measure; see `moe-prism ls methods`. Default product, unless other points are asked for.",
        flag="compare",
        method=("slots", "rule"),
    )
    methods: tuple[str, ...] = option(
        (),
        "Comma-separated methods, on the same axes: those of `moe-prism ls methods`, such as uniform,sensitivity; "
        "all-per-token takes every one whose points can share a batch.",
        method=(None, "method"),
        also=("all-per-token", "prune"),
    )
    given: tuple[str, ...] = option(
        (),
        "Comma-separated files of operating points to measure: of `moe-prism skip`, or another frontier.json.",
        flag="points",
        short=("--plan",),
    )
    per_method: int | None = option(
        None, "Points of a method with a continuous dial; default: where methods without one have theirs.", least=2
    )
    text: str | None = option(None, f"Evaluation text: {SOURCES}. Only its evaluation side is used. {DEFAULT_TEXT}")
    text_field: list[str] = option([], FIELDS)
    domains: list[str] = option([], f"{DOMAINS}, and the quality on each beside that on all.", flag="domain", is_repeated=True)
    tokens: int = option(16_384, "Evaluation tokens.")
    length: int = option(512, "Tokens per window.")
    calibration_tokens: int = option(8_192, "Tokens that methods fit on, of the calibration side of the text.")
    devices: int = option(
        0,
        "Devices that the experts of a layer are dealt out to, in order, for the column of sends; 0: every expert has one of its own.",
        least=0,
    )
    judge: tuple[str, ...] = option(
        (),
        "Comma-separated slices of the text on which every point is compared with the full model, beside perplexity; "
        "see `moe-prism ls slices`. all takes every one that the text has questions for. Costs about as much time again.",
        names="moe_prism.frontier.judge:slices",
        also=("all",),
    )
    low_memory: bool = option(False, f"{LOW_MEMORY_WORDS} Without methods that change weights, and without int8 and int4 rows.")

    def check(self) -> None:
        super().check()
        if any(given.isdigit() for given in self.given):
            number = next(given for given in self.given if given.isdigit())
            raise UsageError(f"--points {number} is no file of operating points", f"say --per-method {number} for their number")
        check_windows(self.length, tokens=self.tokens, calibration_tokens=self.calibration_tokens)
        if self.judge and self.low_memory:
            raise UsageError("--judge generates text, with the model in memory", "leave it or --low-memory out")
        if self.text is not None or self.domains:
            check_there(self.source)

    @property
    def source(self) -> TextSource:
        """What --text, --text-field and --domain name."""
        return text_source(self.text, self.text_field, self.domains)


@dataclass(frozen=True, kw_only=True)
class TimeOptions(Options):
    """Whether points are timed too, and how many sequences decode together then."""

    time: bool = option(
        False, "Also time decoding at every point on this machine, in turns with plain top-k, in a process of its own: a minute."
    )
    time_batch: int | None = option(None, "With --time: sequences that decode together. Default 1.", least=1)

    def check(self) -> None:
        super().check()
        if self.time_batch is not None and not self.time:
            raise UsageError("--time-batch belongs to --time", "add --time")


def check_windows(length: int, **counts: int) -> None:
    """UsageError where a number of tokens has no window of this length."""
    for name, tokens in counts.items():
        if tokens < length or length < 8:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {tokens} with --length {length} is too small", "give at least one window of 8 tokens")

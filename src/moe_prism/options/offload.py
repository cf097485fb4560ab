"""What a forecast of offloading is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class OffloadOptions(Options):
    """How fast a token must come, over which link, and what is replayed to find out. budgets: of the ways that are compared, no flag.

    >>> import moe_prism
    >>> moe_prism.OffloadOptions(target_ms=0).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --target-ms 0 is out of range; give more than 0
    """

    target_ms: float | None = option(
        None, "Milliseconds a token may take; the largest budget within it is chosen. Default: no limit.", above=0
    )
    link: str | None = option(
        None,
        "Bytes per second of what the experts will be read over, for example 500MB, if that is slower than the disk they are on now.",
    )
    expert_file: Path | None = option(
        None, "Where the experts are packed, written on first use; default experts.pack in the folder."
    )
    expert_parts: int | None = option(
        None,
        "Records per expert in that file: 1 for whole experts, else the model's sub-experts, the default.",
        least=1,
        most=1024,
    )
    point: list[str] = option(
        [],
        "With records of planes: also forecast this operating point, by its name in frontier.json, or its file.",
        is_repeated=True,
    )
    expert_ahead: int | None = option(
        None,
        "Also forecast reading up to so many sub-experts ahead of a layer; default what --expert-settings says, else none.",
        least=0,
    )
    expert_predictor: str | None = option(
        None,
        "What guesses the experts that are read ahead; default that of --expert-settings, else gate.",
        names="moe_prism.offload.predict:predictors",
    )
    expert_settings: Path | None = option(
        None, "Settings of `moe-prism offload fit`: its policy is compared as it was fitted, and what it reads ahead."
    )
    tokens: int = option(1280, "Of the text that is replayed, in whole requests of 160.", least=1)
    budgets: tuple[float, ...] | None = None

"""What a continuation is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """How many tokens, and how they are drawn.

    >>> import moe_prism
    >>> moe_prism.GenerateOptions(max_tokens=20).temperature
    0.0
    """

    max_tokens: int = option(64, "Tokens to generate.", least=1)
    temperature: float = option(0.0, "0 is greedy.", least=0, below=math.inf)
    seed: int = option(0, "Seed of sampling.", least=0, below=2**63)
    kv_entries: int | None = option(
        None,
        "Tokens that each head of attention remembers: others are evicted, or merged into those that are alike (EMS). Default: all.",
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class PointOptions(Options):
    """Which operating point."""

    point: str | None = option(
        None,
        "Operating point to run at: a name in the folder's frontier.json, or a file. Default: the model itself.",
        short=("--plan",),
    )
    bytes_per_token: float | None = option(
        None,
        "Bytes of expert weights that a token may read, such as 300kB: the measured point of the folder's frontier.json that is closest "
        "to the model within them.",
        unit=("B",),
        above=0,
    )
    decode: str | None = option(
        None,
        "How tokens follow from forwards: a method of decoding, such as self-draft or self-draft:budget=0.25:length=4; see `moe-prism ls "
        "methods`. Default: what --point says, else one forward for each token.",
        method=("decoding", "decoding method"),
    )
    verifier: str | None = option(
        None, "FILE.py:FUNCTION for methods of decoding that ask how good a text is: (prompt, text) to a number. The file is run."
    )
    retriever: str | None = option(
        None, "FILE.py:FUNCTION for methods of decoding that retrieve: prompt to text that stands before it. The file is run."
    )
    budget: float | None = option(
        None,
        "Share of the bytes that a token reads, selection and compensation included, in (0, 1]; of its slots for other rules than "
        "threshold. With --point, of what its routing leaves.",
    )
    rule: str | None = option(None, "Selection rule; see `moe-prism ls methods`. Default: threshold.", method=("slots", "rule"))
    control: Literal["mean", "strict", "none"] | None = option(
        None,
        "Who the budget is held for: the mean of a request's tokens, every token (strict), or nobody (none: it is met on average over "
        "text like the calibration's). Default: mean for threshold, the only rule that can; none for the others.",
    )

    def check(self) -> None:
        super().check()
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UsageError(f"budget {self.budget:g} is outside (0, 1]", "1 keeps every slot, 0.5 half of the bytes")


@dataclass(frozen=True, kw_only=True)
class TunedOptions(Options):
    """What of the model is another one for these prompts."""

    adapter: Path | None = option(
        None, "Folder of a fine-tune of this model that `moe-prism adapter` wrote: its experts answer. Default: the model's own."
    )
    rewire: int = option(
        0,
        "Steps of Adam that fit a vector on the router's logits to each prompt, before it is answered (Rewiring). 0: none, exactly the "
        "model. 5 is usual. Each takes a forward and a backward pass of the prompt.",
        least=0,
        most=1000,
    )
    rewire_share: float = option(
        0.25, "With --rewire: the share of the MoE layers that get a vector, at least one.", above=0, most=1
    )
    rewire_sure: bool = option(
        False,
        "With --rewire: take the layers whose router is surest. Default: the least sure ones, as the paper's formula has it.",
    )
    rewire_rate: float = option(0.05, "With --rewire: the rate of Adam, in logits per step.", above=0, most=10)

    def check(self) -> None:
        super().check()
        if not self.rewire and (self.rewire_share, self.rewire_sure, self.rewire_rate) != (0.25, False, 0.05):
            raise UsageError("--rewire-share, --rewire-sure and --rewire-rate belong to --rewire", "give --rewire 5")
        if self.rewire and self.adapter is not None:
            raise UsageError("--rewire does not go with --adapter", "leave one of them out")

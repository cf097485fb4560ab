"""What a load test is asked for: what is offered, and to one server or to one per policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class Offer(Options):
    """Which requests are offered.

    >>> import moe_prism
    >>> moe_prism.Offer(name="chat", seconds=30).slower
    1.0
    """

    name: str = option(
        "classes",
        "chat (Poisson), burst (gamma), classes (a day with a step to three times), or longtail.",
        flag="workload",
    )
    seconds: float | None = option(
        None,
        "How long requests are offered, default 60, or all of a trace as recorded; the first and the last tenth do not count.",
        least=1,
        most=86_400,
    )
    trace: Path | None = option(None, "JSON lines to replay instead, stretched to --rate (auto: as recorded).")
    spread: float = option(
        0.0,
        "Standard deviation, as a share of the levels, of quality floors drawn per request; 0 keeps the classes'.",
        least=0,
        most=1,
    )
    slower: float = option(1.0, "Factor on the classes' times, for a machine that is this much slower.", least=1e-3, most=1e3)

    def check(self) -> None:
        super().check()
        if self.trace is not None and not self.trace.is_file():
            raise UsageError(f"no trace at {self.trace}", "give a file of JSON lines, see docs/reference/serving.md")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Options):
    """How requests are offered, to any server."""

    rates: tuple[float, ...] = option(
        (),
        "Requests per second, several with commas; with --compare also auto, near the saturation of fifo.",
        flag="rate",
        empty="auto",
        above=0,
        most=1e5,
    )
    seed: int = option(0, "Of arrivals and prompts; with --compare, repeat i has seed + i.", least=0)
    patience: float = option(30.0, "Seconds to wait for answers after the last request; what is unfinished then counts as bad.")
    config: Path | None = option(None, "qos.yaml with request classes; with --compare also the engine's size.")


@dataclass(frozen=True, kw_only=True)
class SingleOptions(LoadOptions):
    """How one running server is asked. Without rates a trace is replayed as recorded.

    >>> import moe_prism
    >>> moe_prism.SingleOptions(rates=(4.0,)).patience
    30.0
    """

    fields: Literal["auto", "none", "targets", "class"] = option(
        "auto",
        "What requests say: targets (quality, times, priority), class (also the class), none; auto: targets if the server has "
        "levels.",
    )
    tokenizer: str | None = option(
        None, "Model folder whose tokenizer cuts prompts exactly; default: by the server's characters per token."
    )
    model: str | None = option(None, "Model name; default: the server's first.")
    api_key: str | None = option(None, "Key of the server; default: the variable MOE_PRISM_API_KEY.")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(LoadOptions):
    """Which policies are compared. Without rates, one near the saturation of fifo is offered.

    >>> import moe_prism
    >>> moe_prism.CompareOptions().policies
    ('fifo', 'prism', 'elastic')
    """

    policies: tuple[str, ...] = option(("fifo", "prism", "elastic"), "With --compare, which; options as in elastic:quality=0.95.")
    load: float = option(1.25, "With --rate auto, the share of fifo's simulated capacity to offer.", least=0.05, most=20)
    repeats: int = option(3, "With --compare, runs of each policy, taken in turn.", least=1, most=100)
    cost: Path | None = option(None, "With --compare, cost model to load instead of measuring one.")
    save_cost: Path | None = option(None, "With --compare, where to save it.")
    probe_seconds: float = option(8.0, "With --compare, seconds to measure it.")

"""The whole path on the shipped model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefact.load import load
from ..frontier import Frontier
from ..options.calibrate import CalibrateOptions
from ..options.frontier import FrontierOptions
from ..options.generate import GenerateOptions
from ..options.refactor import RefactorOptions
from ..progress import Report, silent
from ..result import Result
from .frontier import measure_frontier
from .frontier_files import write_frontier
from .generate import generate
from .refactor import refactor

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):"
MODEL = "elastic-nano"
BUDGETS = (1.0, 0.5, 0.25)
FULL = RefactorOptions(), FrontierOptions(rules=("product", "threshold"))
QUICK = (
    RefactorOptions(calibration=CalibrateOptions(tokens=16_384, reservoir=1024), profile_tokens=2048),
    FrontierOptions(rules=("threshold",), per_method=10, tokens=3072),
)
"""What is fitted and measured where a minute is all there is: less text, half of the inputs per expert, a shorter profile, one rule, fewer
points of it. Of ten points one lies just below each price of plain top-k; of eight, one just above half, and the report compared with a
point at 40 %."""


@dataclass(frozen=True)
class Demo(Result):
    """The measured frontier, texts that were generated at three budgets, and the report's file."""

    frontier: Frontier
    samples: list[dict[str, Any]]
    report: Path
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"frontier": self.frontier.to_json(), "samples": self.samples, "report": str(self.report)}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per point."""
        return self.frontier.to_records()

    def in_words(self) -> str:
        """One paragraph: what half of the bytes cost in quality, beside the plain model with half of its experts."""
        return in_words(self.frontier, self.tokens)


def run_demo(out: str | Path = "demo", *, full: bool = False, force: bool = False, report: Report = silent) -> Demo:
    """Cut prism-nano into sub-experts, measure its frontier, generate at three budgets; writes a report. A minute on two cores.

    out: folder for elastic-nano/, frontier.json, report.html and frontier.png. full: fit and measure on four times as much text, and
    compare two rules.

    >>> import moe_prism
    >>> demo = moe_prism.run_demo("demo")
    >>> demo.in_words().startswith("In words: the model can read")
    True
    """
    folder, (cut, options) = Path(out), FULL if full else QUICK
    refactor("nano", folder / MODEL, cut, force=force, report=report)
    result = measure_frontier(folder / MODEL, options, report=report)
    model, tokenizer = load(folder / MODEL, wide=True)  # as it was measured: the products of narrow weights need not be compiled
    generate(model, tokenizer, PROMPT, 0.5, sampling=GenerateOptions(max_tokens=4))  # the first call pays for set-up
    samples = []
    for budget in BUDGETS:
        made = generate(model, tokenizer, PROMPT, budget, sampling=GenerateOptions(max_tokens=48, temperature=0.6))
        samples.append({"budget": budget, "prompt": PROMPT, "text": made.text, "tokens_per_s": made.tokens_per_s})
    write_frontier(result, folder, samples={"samples": samples})
    return Demo(result, samples, folder / "report.html", options.tokens)


def in_words(result: Frontier, tokens: int) -> str:
    """One paragraph: what half of the bytes cost in quality, beside the plain model with half of its experts."""
    full = max(p.active_expert_bytes for p in result.points)
    half = min((p for p in result.points if p.rule == "threshold"), key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    plain = min(result.baseline_topk, key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    shares = half.active_expert_bytes / full, plain.active_expert_bytes / full
    bits = min(result.baseline_bits, key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    return "\n".join(
        (
            f"In words: the model can read {shares[0]:.0%} of its expert bytes per token, and still names the same next token as in full",
            f"for {half.top1_agreement:.1%} of {tokens:,} held-out tokens. With half of its experts switched off instead,",
            f"it reads {shares[1]:.0%} and agrees for {plain.top1_agreement:.1%}; its distance to the full model",
            f"(KL) is {plain.kl / half.kl:.1f} times as large.",
            f"Rounding all weights to {bits.name} reads {bits.active_expert_bytes / full:.0%} and agrees for {bits.top1_agreement:.1%},",
            "at one price for every request; the two can be combined.",
            "Nothing was retrained, and each request can choose its own price.",
        )
    )

"""`moe-prism demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .output import emit, note, progress

if TYPE_CHECKING:
    from ..frontier import Frontier

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):"
MODEL = "elastic-nano"
RULES = ("product", "threshold")
BUDGETS = (1.0, 0.5, 0.25)
QUICK_TOKENS = 3072
STEPS = """This takes about a minute on two cores:
  1. calibrate prism-nano, a small MoE that knows Python, and cut its experts into sub-experts
  2. measure quality and cost of its operating points, on Python files that it never saw
  3. let it write at three prices"""
NEXT = """Next, with your own model (a folder, or `nano` to try):
  moe-prism inspect MODEL
  moe-prism refactor MODEL -o elastic --text YOUR_TEXT --dry-run
  moe-prism frontier elastic --compare threshold"""


def demo(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("demo"),
    full: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """The whole path on the shipped model: cut prism-nano into sub-experts, measure its frontier, generate at three prices.

    Parameters
    ----------
    out: Folder for elastic-nano/, frontier.json, report.html and frontier.png.
    full: Measure on 16,384 held-out tokens instead of 3,072.
    force: Replace what an earlier demo left there.
    json: One JSON object on stdout.
    """
    note(STEPS)
    from ..artefact.load import load
    from ..jobs.frontier import measure_frontier as measure
    from ..jobs.generate import generate
    from ..jobs.refactor import refactor
    from ..options.frontier import FrontierOptions
    from ..options.generate import GenerateOptions
    from .frontier import show, show_comparison, write

    refactor("nano", out / MODEL, force=force, report=progress)
    options = FrontierOptions(rules=RULES) if full else FrontierOptions(rules=RULES, tokens=QUICK_TOKENS)
    result = measure(out / MODEL, options, report=progress)
    model, tokenizer = load(out / MODEL)
    generate(model, tokenizer, PROMPT, 0.5, sampling=GenerateOptions(max_tokens=4))  # the first call pays for set-up
    samples = []
    for budget in BUDGETS:
        made = generate(model, tokenizer, PROMPT, budget, sampling=GenerateOptions(max_tokens=48, temperature=0.6))
        samples.append({"budget": budget, "prompt": PROMPT, "text": made.text, "tokens_per_s": made.tokens_per_s})
    write(result, out, {"samples": samples})
    text = [show(result), "", show_comparison(result), ""]
    for sample in samples:
        text += [f"--- budget {sample['budget']:g}", f"{sample['prompt']}{sample['text']}", ""]
    text += [in_words(result, options.tokens), ""]
    emit({"frontier": result.to_json(), "samples": samples, "report": str(out / "report.html")}, "\n".join(text), json)
    note(f"The report: {(out / 'report.html').resolve().as_uri()}\n\n{NEXT}")


def in_words(result: Frontier, tokens: int) -> str:
    """One paragraph: what half of the bytes cost in quality, beside the plain model with half of its experts."""
    full = max(p.active_expert_bytes for p in result.points)
    half = min((p for p in result.points if p.rule == "threshold"), key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    plain = min(result.baseline_topk, key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    shares = half.active_expert_bytes / full, plain.active_expert_bytes / full
    return "\n".join(
        (
            f"In words: the model can read {shares[0]:.0%} of its expert bytes per token, and still names the same next token as in full",
            f"for {half.top1_agreement:.1%} of {tokens:,} held-out tokens. With half of its experts switched off instead,",
            f"it reads {shares[1]:.0%} and agrees for {plain.top1_agreement:.1%}; its distance to the full model",
            f"(KL) is {plain.kl / half.kl:.1f} times as large.",
            "Nothing was retrained, and each request can choose its own price.",
        )
    )

"""`moe-prism demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note, progress

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):"
MODEL = "elastic-nano"
RULES = ("product", "threshold")
BUDGETS = (1.0, 0.5, 0.25)


def demo(
    *, out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("demo"), force: bool = False, json: bool = False
) -> None:
    """The whole path on the shipped model: cut prism-nano into sub-experts, measure its frontier, generate at three prices.

    Parameters
    ----------
    out: Folder for elastic-nano/, frontier.json, report.html and frontier.png.
    force: Replace what an earlier demo left there.
    json: One JSON object on stdout.
    """
    from ..artefact.load import load
    from ..jobs.frontier import measure_frontier as measure
    from ..jobs.generate import generate
    from ..jobs.refactor import refactor
    from ..options.frontier import FrontierOptions
    from ..options.generate import GenerateOptions
    from .frontier import show, show_comparison, write

    refactor("nano", out / MODEL, force=force, report=progress)
    result = measure(out / MODEL, FrontierOptions(rules=RULES), report=progress)
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
    emit({"frontier": result.to_json(), "samples": samples, "report": str(out / "report.html")}, "\n".join(text), json)
    note(f"open {out / 'report.html'}")

"""`moe-prism demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note, progress

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
    full: Fit on 65,536 tokens instead of 16,384 and twice the inputs per expert, and measure two rules instead of one on 16,384 tokens.
    force: Replace what an earlier demo left there.
    json: One JSON object on stdout.
    """
    note(STEPS)
    from ..jobs.demo import run_demo
    from .frontier import show, show_comparison

    done = run_demo(out, full=full, force=force, report=progress)
    result = done.frontier
    text = [show(result), "", show_comparison(result), ""]
    for sample in done.samples:
        text += [f"--- budget {sample['budget']:g}", f"{sample['prompt']}{sample['text']}", ""]
    text += [done.in_words(), ""]
    emit(done.to_json(), "\n".join(text), json)
    note(f"The report: {done.report.resolve().as_uri()}\n\n{NEXT}")

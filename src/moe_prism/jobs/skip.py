"""Make a skip plan for a model, with its measured quality on record."""

from __future__ import annotations

from pathlib import Path

from ..artefact.open import open_model
from ..elastic.bind_plans import made
from ..elastic.runtime import Setting
from ..frontier.measure import measure
from ..methods.skip.base import SkipOptions, skip_method
from ..progress import Report, silent
from ..routing import SkipPlan
from .frontier import FrontierOptions, evaluation_windows, subject_of

__all__ = ["SkipOptions", "make_plan"]


def make_plan(
    folder: str | Path,
    method: str = "sensitivity",
    mean: float | None = None,
    options: SkipOptions | None = None,
    *,
    text: str = "stdlib",
    tokens: int = 8_192,
    length: int = 512,
    report: Report = silent,
) -> SkipPlan:
    """A plan of `mean` experts per token and layer, by a method of expert skipping (`moe-prism ls methods`).

    Fitted on `tokens` tokens of the calibration side of a text; `made["quality"]` is its perplexity, KL to the full model (nats per token),
    top-1 agreement and experts per token on as many of the other side. Raises UsageError for a folder, method or number that does not fit.
    """
    chosen = skip_method(method)
    frontier = FrontierOptions(text=text, tokens=tokens, length=length, calibration_tokens=tokens)
    frontier.check()
    opened = open_model(folder)
    subject = subject_of(opened, frontier, report)
    plan = chosen.finished(subject, mean, options)
    windows = evaluation_windows(opened, frontier)
    with report("quality of the plan") as update:
        [(quality, cost)] = measure(opened.model, opened.elastic, windows.ids, [Setting(routing=made([plan]))], progress=update)
    record = {
        "text": windows.source,
        "tokens": windows.tokens,
        "kl": quality.kl,
        "ppl": quality.ppl,
        "top1_agreement": quality.top1_agreement,
        "experts_per_token": cost.k_slots / opened.n_sub,
    }
    return plan.with_(made={**plan.made, "text": text, "model": opened.name, "quality": record})

"""Make a skip plan for a model, with its measured quality on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..artefact.open import Opened, known_documents, open_model, sub_experts
from ..artefact.streamed import open_streamed
from ..data import Windows
from ..errors import UsageError
from ..frontier.measure import BATCH, measure
from ..methods.skip.base import SkipMethod, skip_method
from ..model import load_tokenizer, resolve
from ..options.frontier import FrontierOptions
from ..options.skip import SkipOptions
from ..point import NamedPoint
from ..progress import Report, silent
from .frontier import calibration_ids, evaluation_windows, subject_of
from .rehearsal import begin
from .resources import model_tree, needed_by_running
from .which_text import with_text


def make_skip_plan(folder: str | Path, options: SkipOptions | None = None, *, report: Report = silent) -> NamedPoint:
    """An operating point that computes `mean` experts per token and layer, by a method of expert skipping (`moe-prism ls methods`).

    Fitted on `tokens` tokens of the calibration side of a text; `made["quality"]` is its perplexity, KL to the full model (nats per token),
    top-1 agreement and experts per token on as many of the other side. Raises UsageError for a folder, method or number that does not fit.

    >>> import moe_prism
    >>> asked = moe_prism.SkipOptions(method="uniform", mean=2, tokens=256, length=128)
    >>> [row["experts"] for row in moe_prism.make_skip_plan("nano", asked).to_records()]
    [2, 2, 2, 2, 2, 2]
    """
    options = options or SkipOptions()
    options.check()
    options = with_text(options, folder)
    chosen = with_parameters(skip_method(options.method), options.parameters)
    frontier = FrontierOptions(
        text=options.text,
        text_field=options.text_field,
        tokens=options.tokens,
        length=options.length,
        calibration_tokens=options.tokens,
    )
    where = resolve(folder)
    tree, tokenizer, cut = model_tree(where), load_tokenizer(where), sub_experts(where)
    windows = evaluation_windows(tokenizer, known_documents(where), frontier)
    if chosen.needs:
        calibration_ids(tokenizer, frontier)
    rows, fits = BATCH * windows.ids.shape[1], bool(chosen.needs)
    begin(needed_by_running(tree, rows=rows, cut=cut, fits=fits, low_memory=options.low_memory))
    if options.low_memory:
        with open_streamed(folder) as opened:
            return _plan(opened, chosen, windows, options, report, frontier)
    return _plan(open_model(folder), chosen, windows, options, report, frontier)


def _plan(
    opened: Opened, chosen: SkipMethod, windows: Windows, options: SkipOptions, report: Report, frontier: FrontierOptions
) -> NamedPoint:
    subject = subject_of(opened, frontier, report)
    named = chosen.point(subject, options.mean, options.keep_mass)
    with report("quality of the plan") as update:
        [found] = measure(opened.model, windows.ids, [named.point], progress=update)
    record = {
        **windows.facts(),
        "tokens": windows.tokens,
        "kl": found.quality.kl,
        "ppl": found.quality.ppl,
        "top1_agreement": found.quality.top1_agreement,
        "experts_per_token": found.cost.k_slots / opened.n_sub,
    }
    return replace(named, made={**named.made, "text": options.text, "model": opened.name, "quality": record})


def with_parameters(chosen: SkipMethod, given: Mapping[str, Any]) -> SkipMethod:
    """The method with some of its parameters set. UsageError for one that it does not have."""
    known = [f.name for f in fields(chosen.Parameters)]
    for name in given:
        if name not in known:
            plain = chosen.name.partition(":")[0]
            raise UsageError(f"method '{plain}' has no --{name.replace('_', '-')}", f"it has: {', '.join(known) or 'none'}")
    return type(chosen)(chosen.name, replace(chosen.parameters, **given))

"""Fit the bits of each expert for records of planes, by what the model loses with it alone (EdgeMoE, `methods/quantize/edge_moe.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..artefact.open import open_model
from ..compress.changes import change_of
from ..compress.quantize import QuantizeChange
from ..errors import UsageError
from ..frontier.measure import measure
from ..methods.find import method
from ..options.frontier import FrontierOptions
from ..progress import Report
from .frontier import evaluation_windows, subject_of
from .which_text import with_text

METHOD = "edge-moe:bound={:.12g}:widths=4-8:codec=nested"
OPTIONS = FrontierOptions(length=256, tokens=2048, calibration_tokens=4096)


@dataclass(frozen=True)
class BitsFit:
    """bound: of the KL on calibration text; kl: on held-out text; expert_bits: of every layer those of each expert."""

    bound: float
    kl: float
    expert_bits: tuple[tuple[int, ...], ...]


def fit_bits(folder: Path, max_kl: float, report: Report) -> BitsFit:
    """The fewest bits within the loss, 4 or 8 for each expert. UsageError where 8 bits for all lose more, or nothing may be lost."""
    if not max_kl:
        raise UsageError("--max-kl 0 leaves no expert fewer bits", "give more than 0, or leave --planes out")
    opened, options = open_model(folder), with_text(OPTIONS, folder)
    subject = subject_of(opened, options, report)
    (named,) = method(METHOD.format(max_kl)).points(subject)
    documents = opened.manifest["calibration"]["documents"] if opened.manifest else ()
    windows = evaluation_windows(opened.tokenizer, documents, options)
    kl = measure(opened.model, windows.ids, [named.point])[0].quality.kl
    assert named.point.weights is not None
    change = change_of(named.point.weights)
    assert isinstance(change, QuantizeChange)
    widths = change.widths([layer.parts.layer for layer in subject.elastic.layers])
    return BitsFit(max_kl, kl, tuple(tuple(int(bits) for bits in own) for own in widths))

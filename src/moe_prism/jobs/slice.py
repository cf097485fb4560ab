"""Write a checkpoint without some of its experts' neurons, or only say which would go."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.output import Writing, check_apart, finished
from ..checkpoint import Journal, OutputFolder, write_manifest
from ..compress.slice.change import SliceChange
from ..compress.slice.choose import choose_neurons, equal_width
from ..compress.slice.protect import shields
from ..compress.slice.write import SlicedCheckpoint
from ..errors import UsageError
from ..methods.neurons.base import OWN, LayerSeen, NeuronMethod
from ..options.compress import CompressOptions
from ..point import NamedPoint, OperatingPoint
from ..progress import Report
from .calibrate import discard_snapshots
from .fitting import Fitting, Refitted, least_tokens
from .rehearsal import begin
from .slice_card import sliced_card

KIND = "sliced"
POINT = "point.json"
"""What went, as an operating point of the source: `frontier SOURCE --points` measures it there."""


@dataclass(frozen=True)
class Sliced(Refitted):
    """How many neurons stay, and where."""

    counted = "neurons"


class Slicing(Fitting):
    """One model, the method that ranks its neurons, and the text of the pass if there has to be one."""

    def __init__(self, model: str | Path, method: NeuronMethod, options: CompressOptions, calibration: str | Path | None) -> None:
        self.keep, self.method = asked_share(method, options), method
        super().__init__(model, options, sorted({*method.collectors, *(["outputs"] if options.protect else [])}), calibration)
        layers = self.weights.layers
        width = equal_width(layers[0].width, self.keep, options.multiple) if options.widths == "equal" else None
        method.request(self.keep, [0.0] * len(layers)).check(min(layer.width for layer in layers))
        shields(layers, [], [], self.pins)
        self.output = SlicedCheckpoint(self.stream, layers, width)
        self.width = width
        self.read_text()

    def needed(self) -> dict[str, Any]:
        """Memory and disk of the run."""
        return self.needed_for(*self.output.bytes())

    def planned(self) -> dict[str, Any]:
        """What is known before anything was measured."""
        full = self.weights.layers[0].width
        share = self.keep if self.width is None else self.width / full
        return {"asked": self.keep, "share": share, "widths": self.options.widths, "width": self.width, "of": full}

    def select(self, folder: OutputFolder, journal: Journal, report: Report) -> tuple[list[Tensor], dict[str, Any]]:
        """Which neurons stay, [E, f] (bool) per layer, and the facts of it."""
        layers, statistics = self.weights.layers, self.gathered(folder, journal, report)
        values = self.values(statistics)
        scores, evidence = [], []
        with report("score") as update:
            for number, (layer, own) in enumerate(zip(layers, values, strict=True), 1):
                with self.weights.loaded(layer):
                    found, more = self.method.judge(LayerSeen(layer, own))
                scores.append(found)
                evidence.append(more)
                update(number, len(layers))
        protected = shields(layers, values, self.options.protect, self.pins)
        request = self.method.request(self.keep, evidence)
        own_widths = choose_neurons(scores, request, protected)
        kept = own_widths
        if self.width is not None:
            kept = choose_neurons(
                scores, replace(request, scope="expert", multiple=self.options.multiple, shares=None), protected
            )
        facts = {**self.planned(), "share": SliceChange.of(kept).resident_share}
        counts = torch.cat([mask.sum(1) for mask in kept])
        facts |= {"narrowest": int(counts.min()), "widest": int(counts.max()), "least_tokens": least_tokens(statistics)}
        facts |= {"score_lost": _lost(scores, kept), "score_lost_by_the_method_alone": _lost(scores, own_widths)}
        return kept, facts


def plan_slice(model: str | Path, method: NeuronMethod, options: CompressOptions, calibration: str | Path | None) -> Sliced:
    """What would be written; no weight is read."""
    job = Slicing(model, method, options, calibration)
    return Sliced(options.method, job.output.bytes(), job.planned(), job.needed())


def measure_slice(
    model: str | Path, method: NeuronMethod, options: CompressOptions, calibration: str | Path | None, report: Report
) -> Sliced:
    """The same after the pass: which neurons stay; nothing is written."""
    job = Slicing(model, method, options, calibration)
    needed = job.needed()
    begin(needed)
    with tempfile.TemporaryDirectory() as scratch, OutputFolder(Path(scratch) / "selection") as folder:
        _, facts = job.select(folder, Journal(folder.work, {}), report)
    return Sliced(options.method, job.output.bytes(), facts, needed)


def write_slice(
    model: str | Path,
    out: str | Path,
    method: NeuronMethod,
    options: CompressOptions,
    calibration: str | Path | None,
    **how: Unpack[Writing],
) -> Sliced:
    """Write the checkpoint at `out`. Raises UsageError, DoesNotFit or CorruptError before anything is visible there."""
    job = Slicing(model, method, options, calibration)
    weights, resume, force = job.weights, how.get("resume", False), how.get("force", False)
    check_apart(weights.path, out)
    inputs = job.inputs
    result = Sliced(options.method, job.output.bytes(), {}, job.needed(), Path(out))
    if resume and (done := finished(out, {"kind": KIND, **inputs})):
        return replace(result, facts=done["result"], manifest=done)
    lasts = partial(job.lasts, result.needed["disk_bytes"])
    begin(result.needed, out, resume=resume, force=force, lasts=lasts)
    with OutputFolder(out, resume=resume, force=force) as folder:
        report = how["report"]
        journal = Journal(folder.work, inputs)
        kept, facts = job.select(folder, journal, report)
        with report("write") as update:
            job.output.write(kept, folder, journal, update)
        point = OperatingPoint(weights=SliceChange.of(kept).part())
        folder.write_bytes(POINT, NamedPoint(name=f"{method.name.partition(':')[0]}-{job.keep:g}-written", point=point).encoded())
        plain = {"dequantized": weights.dequantized} if weights.dequantized else {}
        about = {
            "kind": KIND,
            **inputs,
            "companions": weights.companions,
            **plain,
            "result": facts,
            "documents": list(job.documents),
        }
        folder.write_bytes("README.md", sliced_card(about, method.name, weights.model.config.model_type).encode())
        discard_snapshots(folder)
        manifest = write_manifest(folder, about)
        folder.finish()
    return replace(result, facts=facts, manifest=manifest)


def asked_share(method: NeuronMethod, options: CompressOptions) -> float:
    """The share that stays, by --keep or by the method's name. UsageError for none, two, or a name that says how wide experts are."""
    plain, asked = method.name.partition(":")[0], method.parameters
    if options.keep is not None and asked.keep:
        raise UsageError(f"both --keep {options.keep:g} and '{method.name}' say how many neurons stay", "give one of them")
    share = options.keep or asked.keep
    if not share:
        raise UsageError(f"'{method.name}' does not say how many neurons stay", "add --keep 0.75")
    if options.widths == "equal" and (asked.scope != OWN or asked.multiple != 1):
        raise UsageError(f"'{method.name}' says how wide experts are", f"add --widths own, or write {plain} and --multiple")
    return share


def _lost(scores: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """The share of all scores that goes."""
    total = sum(float(own.sum()) for own in scores)
    return sum(float(own[~mask].sum()) for own, mask in zip(scores, kept, strict=True)) / max(total, 1e-300)

"""Write a checkpoint without some of its experts' neurons, or only say which would go."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.statistics import Statistics
from ..checkpoint import Journal, OutputFolder, read_manifest, source_facts, write_manifest
from ..checkpoint.manifest import MANIFEST
from ..compress.slice.change import SliceChange
from ..compress.slice.choose import choose_neurons, equal_width
from ..compress.slice.protect import shields
from ..compress.slice.write import SlicedCheckpoint
from ..data import Windows
from ..errors import UsageError
from ..methods.neurons.base import OWN, LayerSeen, NeuronMethod
from ..model import resolve
from ..model.place import recorded
from ..options.compress import CompressOptions, pinned
from ..point import NamedPoint, OperatingPoint
from ..progress import Report, peak_rss_bytes
from ..result import Result
from .calibrate import calibration_windows, check_fit, check_fits, discard_snapshots, read_statistics, run_pass
from .rehearsal import begin
from .resources import needed_by_pass, needed_by_rewriting
from .slice_card import sliced_card
from .which_text import with_text

KIND = "sliced"
POINT = "point.json"
"""What went, as an operating point of the source: `frontier SOURCE --points` measures it there."""


@dataclass(frozen=True)
class Sliced(Result):
    """method: as it was asked; expert_bytes: in the files, before and after; facts: how many neurons stay; needed: by the run."""

    method: str
    expert_bytes: tuple[int, int]
    facts: Mapping[str, Any]
    needed: Mapping[str, Any]
    folder: Path | None = None
    manifest: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `compress --json` prints."""
        before, after = self.expert_bytes
        left = {"left_out": self.manifest["companions"]["left_out"]} if self.manifest else {}
        return {
            **({"folder": str(self.folder)} if self.folder else {}),
            "method": self.method,
            "expert_bytes": {"before": before, "after": after},
            "neurons": dict(self.facts),
            **({} if self.folder else {"needed": dict(self.needed)}),
            **left,
            "peak_rss_bytes": peak_rss_bytes(),
        }


class Slicing:
    """One model, the method that ranks its neurons, and the text of the pass if there has to be one.

    UsageError, CorruptError or DoesNotFit for what cannot be done, before a weight is read.
    """

    def __init__(self, model: str | Path, method: NeuronMethod, options: CompressOptions, calibration: str | Path | None) -> None:
        where = resolve(model)
        self.keep, self.method = asked_share(method, options), method
        self.asked = recorded(options)
        collectors = sorted({*method.collectors, *(["outputs"] if options.protect else [])})
        if not collectors:
            _check_no_text(method.name, options, calibration)
        self.options = replace(
            options, calibration=with_text(replace(options.calibration, collectors=collectors or ["counts"]), where)
        )
        if where.is_dir() and (where / MANIFEST).is_file() and read_manifest(where).get("kind") == "elastic":
            raise UsageError(
                "neurons of an elastic folder are in the order of its sub-experts", "compress its source, then refactor that"
            )
        self.weights = Weights(where, options.dtype)
        if self.weights.stream is None:
            raise UsageError(
                "a GGUF file is not written again", "load it with transformers' gguf_file=, save_pretrained, compress that"
            )
        self.weights.check_rewritable()
        layers = self.weights.layers
        width = equal_width(layers[0].width, self.keep, options.multiple) if options.widths == "equal" else None
        method.request(self.keep, [0.0] * len(layers)).check(min(layer.width for layer in layers))
        shields(layers, [], [], self._pins())
        self.output = SlicedCheckpoint(self.weights.stream, layers, width)
        self.width = width
        self.given = read_statistics(calibration) if calibration and collectors else None
        if self.given and self.given.facts["source"] != source_facts(self.weights.path):
            raise UsageError(
                f"'{calibration}' was calibrated on another checkpoint", "calibrate this one, or leave --calibration out"
            )
        if self.given:
            check_fits(self.given, self.weights)
        self.windows: Windows | None = None
        if collectors and not self.given:
            self.windows = calibration_windows(self.weights.path, self.options.calibration)
            check_fit(self.weights, self.options.calibration)

    def needed(self) -> dict[str, Any]:
        """Memory and disk of the run."""
        before, after = self.output.bytes()
        size = (self.weights.written_bytes or 0) - before + after
        return (
            needed_by_pass(self.weights, self.options.calibration, size)
            if self.windows
            else needed_by_rewriting(self.weights, size)
        )

    @property
    def documents(self) -> Sequence[str]:
        """SHA-256 of the calibration documents that were used."""
        return self.windows.documents if self.windows else self.given.facts["documents"] if self.given else ()

    def planned(self) -> dict[str, Any]:
        """What is known before anything was measured."""
        full = self.weights.layers[0].width
        share = self.keep if self.width is None else self.width / full
        return {"asked": self.keep, "share": share, "widths": self.options.widths, "width": self.width, "of": full}

    def select(self, folder: OutputFolder, journal: Journal, report: Report) -> tuple[list[Tensor], dict[str, Any]]:
        """Which neurons stay, [E, f] (bool) per layer, and the facts of it."""
        layers, statistics = self.weights.layers, self.given
        if self.windows:
            statistics = run_pass(self.weights.path, self.windows, self.options.calibration, folder, journal, report)
        values: list[Mapping[str, Any]] = [own.values for own in statistics.layers] if statistics else [{} for _ in layers]
        scores, evidence = [], []
        with report("score") as update:
            for number, (layer, own) in enumerate(zip(layers, values, strict=True), 1):
                with self.weights.loaded(layer):
                    found, more = self.method.judge(LayerSeen(layer, own))
                scores.append(found)
                evidence.append(more)
                update(number, len(layers))
        protected = shields(layers, values, self.options.protect, self._pins())
        request = self.method.request(self.keep, evidence)
        own_widths = choose_neurons(scores, request, protected)
        kept = own_widths
        if self.width is not None:
            kept = choose_neurons(
                scores, replace(request, scope="expert", multiple=self.options.multiple, shares=None), protected
            )
        facts = {**self.planned(), "share": SliceChange.of(kept).resident_share}
        counts = torch.cat([mask.sum(1) for mask in kept])
        facts |= {"narrowest": int(counts.min()), "widest": int(counts.max()), "least_tokens": _least_tokens(statistics)}
        facts |= {"score_lost": _lost(scores, kept), "score_lost_by_the_method_alone": _lost(scores, own_widths)}
        return kept, facts

    def _pins(self) -> list[tuple[int, int]]:
        return [pinned(text) for text in self.options.pin]


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
    inputs = {
        "source": source_facts(weights.path),
        "compression": job.asked,
        "statistics": job.given.facts if job.given else None,
    }
    result = Sliced(options.method, job.output.bytes(), {}, job.needed(), Path(out))
    if resume and (done := finished(out, {"kind": KIND, **inputs})):
        return replace(result, facts=done["result"], manifest=done)
    begin(result.needed, out, resume=resume, force=force)
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


def _check_no_text(name: str, options: CompressOptions, calibration: str | Path | None) -> None:
    if calibration or options.calibration != CompressOptions().calibration:
        raise UsageError(f"'{name}' reads no text, so a calibration means nothing", "leave it out")


def _lost(scores: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """The share of all scores that goes."""
    total = sum(float(own.sum()) for own in scores)
    return sum(float(own[~mask].sum()) for own, mask in zip(scores, kept, strict=True)) / max(total, 1e-300)


def _least_tokens(statistics: Statistics | None) -> int | None:
    """The fewest tokens any expert was chosen for; below some hundred its neurons are ranked by little."""
    found = [
        own["count"] for layer in (statistics.layers if statistics else ()) for own in layer.values.values() if "count" in own
    ]
    return min((int(count.min()) for count in found), default=None)

"""Experts in fewer bits: what `compress` does with a codec."""

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
from ..checkpoint import Journal, OutputFolder, source_facts, write_manifest
from ..compress.codec.rtn import Rtn
from ..compress.quantize.decoded import matrices
from ..compress.quantize.prepare import Calibrated, Samples, factors_of, origins
from ..compress.quantize.smooth import exponents, factors, with_floor
from ..compress.quantize.write import PackedCheckpoint, Packing
from ..data import Windows
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..forecast.work_time import Seconds
from ..methods.find import method
from ..methods.quantize.eaquant import EaQuant, EaQuantParameters
from ..methods.quantize.uniform_bits import UniformBits
from ..model import MoELayer, resolve
from ..model.norm_readers import NormReaders, norm_readers
from ..model.place import recorded
from ..options.compress import CompressOptions
from ..progress import Report, Update, peak_rss_bytes, silent
from ..result import Result
from .calibrate import calibration_windows, check_fit, discard_snapshots, run_pass
from .pack_records import records, write_records
from .rehearsal import begin
from .resources import needed_by_pass, told, written_bytes
from .which_text import with_text

KIND = "quantized"
FLOOR = 1.0
"""Of the mean number of tokens: what the Gram matrix of an expert is made of at least."""


@dataclass(frozen=True)
class Compressed(Result):
    """method: as it was asked; expert_bytes: before and after; relative_error: of the weights, squared, where it was measured."""

    method: str
    experts: int
    expert_bytes: tuple[int, int]
    relative_error: float | None = None
    folder: Path | None = None
    manifest: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `compress --json` prints."""
        before, after = self.expert_bytes
        left = {"left_out": self.manifest["companions"]["left_out"]} if self.manifest else {}
        return {
            **({"folder": str(self.folder)} if self.folder else {}),
            "method": self.method,
            "matrices": self.experts,
            "expert_bytes": {"before": before, "after": after},
            "relative_error": self.relative_error,
            **left,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def plan_codec(model: str | Path, options: CompressOptions) -> Compressed:
    """What would be written; no weight is read."""
    if options.format == "records":
        return Compressed(options.method, *records(model, options))
    return _Job(model, options).result()


def measure_codec(model: str | Path, options: CompressOptions, report: Report) -> Compressed:
    """The same, and how far the weights would move; nothing is written."""
    if options.format == "records":
        raise UsageError("how far records move weights is not measured", "write them, or see what they take with --dry-run")
    job = _Job(model, options)
    error = size = 0.0
    with tempfile.TemporaryDirectory() as scratch, OutputFolder(Path(scratch) / "measured") as folder:
        found = job.prepared(folder, Journal(folder.work, {}), report)
        with report("encode") as update:
            for number, (_, lost, own) in enumerate(found.errors(), 1):
                error, size = error + lost, size + own
                update(number, len(found.experts))
    return replace(job.result(), relative_error=error / max(size, 1e-30))


def write_codec(model: str | Path, out: str | Path, options: CompressOptions, **how: Unpack[Writing]) -> Compressed:
    """Write the checkpoint, or the file of records, at `out`; how: see `Writing`."""
    if options.format == "records":
        done = Compressed(options.method, *records(model, options), folder=Path(out))
        write_records(model, out, options, how.get("report", silent), force=how.get("force", False))
        return done
    job = _Job(model, options)
    weights = job.weights
    check_apart(weights.path, out)
    inputs = {"source": source_facts(weights.path), "compression": job.asked()}
    result = replace(job.result(), folder=Path(out))
    if (resume := how.get("resume", False)) and (before := finished(out, {"kind": KIND, **inputs})):
        return replace(result, manifest=before)
    begin(job.needed(), out, resume=resume, force=how.get("force", False), lasts=job.lasts)
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        journal, report = Journal(folder.work, inputs), how.get("report", silent)
        found = job.prepared(folder, journal, report)
        with report("write") as update:
            found.write(folder, journal, update)
        discard_snapshots(folder)
        plain = {"dequantized": weights.dequantized} if weights.dequantized else {}
        facts = {"kind": KIND, **inputs, "companions": weights.companions, "documents": list(job.documents), **plain}
        manifest = write_manifest(folder, facts)
        folder.finish()
    return replace(result, manifest=manifest)


class _Job:
    """One model, how its experts are packed, and the text that this is fitted on, if it is. UsageError for what cannot be written."""

    def __init__(self, model: str | Path, options: CompressOptions) -> None:
        self.smoothing, packing = _asked(options)
        options.check_codec(fitted=self.smoothing is not None or options.error_feedback)
        self.weights = weights = Weights(resolve(model))
        if weights.stream is None:
            raise UsageError("a GGUF file is not written again", "quantize it with the tool that wrote it")
        self.stream = weights.stream
        self.packed = PackedCheckpoint(weights.stream, weights.layers, packing)
        self.windows: Windows | None = None
        if self.smoothing is not None or options.error_feedback:
            options = replace(options, calibration=with_text(options.calibration, weights.path))
            self.windows = calibration_windows(weights.path, options.calibration)
            check_fit(weights, options.calibration)
        self.options = options

    @property
    def documents(self) -> Sequence[str]:
        """SHA-256 of the calibration documents that were used."""
        return self.windows.documents if self.windows else ()

    def asked(self) -> dict[str, Any]:
        """For the manifest: what decides the bytes."""
        options = recorded(self.options)
        of_neurons = {"keep", "widths", "multiple", "protect", "pin", "dtype"}
        return {key: value for key, value in options.items() if key not in of_neurons and (self.windows or key != "calibration")}

    def result(self) -> Compressed:
        """What is known before anything is encoded."""
        return Compressed(self.options.method, len(self.packed.experts), self.packed.bytes())

    def needed(self) -> dict[str, Any]:
        before, after = self.packed.bytes()
        size = max(after, written_bytes(self.weights) - before + after)
        if self.windows:
            return needed_by_pass(self.weights, self.options.calibration, size)
        return told(self.packed.working_bytes(), size)

    def lasts(self) -> Seconds | None:
        """How long packing takes; None where text decides how, which takes longer by what is not known."""
        from .job_times import encoding_time  # a real run wants none of it

        if self.windows is not None:
            return None
        return encoding_time(self.weights.path, self._pack, int(self.needed()["disk_bytes"]))

    def _pack(self, layer: MoELayer, expert: int) -> None:
        for matrix in matrices(layer):
            self.packed.packing.packed("", matrix[expert], None)

    def prepared(self, folder: OutputFolder, journal: Journal, report: Report) -> PackedCheckpoint:
        """The checkpoint, with what calibration text says of it."""
        if self.windows is not None:
            statistics = run_pass(self.weights.path, self.windows, self.options.calibration, folder, journal, report)
            with torch.no_grad(), report("prepare") as update:
                self.packed.prepared = self._calibrated(statistics, update)
        return self.packed

    def _calibrated(self, statistics: Statistics, update: Update) -> Calibrated:
        """A layer in memory at a time."""
        stream, layers, asked = self.stream, self.weights.layers, self.smoothing
        readers: list[NormReaders] = []
        if asked is not None:
            with stream.streaming() as model:
                readers = norm_readers(model, layers)
        scales: list[Tensor] = []
        scaled: dict[str, Any] = {}
        samples: list[Samples] = []
        floor = FLOOR if asked is None else asked.floor
        for number, (layer, own) in enumerate(zip(layers, statistics.layers, strict=True)):
            with stream.module(layer.block_name.rpartition(".")[0]):
                found = with_floor(stream.model, layer, own, floor, experts_per_token(stream.model, layer))
                if asked is not None:
                    scales.append(factors(exponents(layer, [x for x, _ in found], asked.alpha, asked.steps), asked.steps))
                    scaled |= factors_of(stream, readers[number], scales[-1])
            if self.options.error_feedback:
                samples.append(found)
            update(number + 1, len(layers))
        return Calibrated(stream, layers, origins(stream, layers), scales, scaled, samples)


def _asked(options: CompressOptions) -> tuple[EaQuantParameters | None, Packing]:
    """(how inputs are evened out, None: not at all; how experts are packed). UsageError for what has no such form."""
    chosen, advice = method(options.method), "give rtn:bits=4, rtn:bits=8 or eaquant:bits=4"
    smoothing = chosen.parameters if isinstance(chosen, EaQuant) else None
    codec = chosen.codec() if isinstance(chosen, UniformBits) else Rtn() if smoothing else None
    if not isinstance(codec, Rtn):
        raise UsageError(f"'{options.method}' has no form in {options.format}", f"{advice}; `frontier --methods` measures any")
    asked = chosen.parameters
    if not asked.bits:
        raise UsageError(f"'{options.method}' does not say how many bits", advice)
    if smoothing is not None and smoothing.router:
        raise UsageError("a router in fewer bits has no form in compressed-tensors", "leave router out")
    packing = Packing(codec, int(asked.bits), asked.group or codec.groups[0])
    codec.check(packing.bits, packing.group)
    return smoothing, packing

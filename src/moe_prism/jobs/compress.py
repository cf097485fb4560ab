"""Write a checkpoint whose experts take fewer bits or have fewer neurons, or only say what that would save and lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..checkpoint import Journal, OutputFolder, source_facts, write_manifest
from ..compress.codec.rtn import Rtn
from ..compress.quantize.write import PackedCheckpoint, Packing
from ..errors import UsageError
from ..methods.find import method
from ..methods.neurons.base import NeuronMethod
from ..methods.quantize.uniform_bits import UniformBits
from ..model import resolve
from ..options.compress import CompressOptions
from ..progress import Report, peak_rss_bytes, silent
from ..result import Result
from .rehearsal import begin
from .resources import needed_by_rewriting, written_bytes
from .slice import Sliced, measure_slice, plan_slice, write_slice

KIND = "quantized"


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


def plan_compression(
    model: str | Path, options: CompressOptions | None = None, *, calibration: str | Path | None = None
) -> Compressed | Sliced:
    """What would be written; no weight is read. calibration: see `compress_model`.

    >>> import moe_prism
    >>> found = moe_prism.plan_compression("nano", moe_prism.CompressOptions(method="rtn:bits=8"))
    >>> found.expert_bytes[1] < found.expert_bytes[0]
    True
    """
    options = options or CompressOptions()
    if neurons := _neurons(options, calibration):
        return plan_slice(model, neurons, options, calibration)
    found, _ = _packed(model, options)
    return Compressed(options.method, len(found.experts), found.bytes())


def measure_compression(
    model: str | Path,
    options: CompressOptions | None = None,
    *,
    calibration: str | Path | None = None,
    report: Report = silent,
) -> Compressed | Sliced:
    """The same, and how far the weights would move, or which neurons would go; nothing is written.

    >>> import moe_prism
    >>> asked = moe_prism.CompressOptions(method="rtn:bits=8")
    >>> moe_prism.measure_compression("nano", asked).relative_error < 1e-3  # squared, as a share of the weights' squares
    True
    """
    options = options or CompressOptions()
    if neurons := _neurons(options, calibration):
        return measure_slice(model, neurons, options, calibration, report)
    found, _ = _packed(model, options)
    error = size = 0.0
    with report("encode") as update:
        for number, (_, lost, own) in enumerate(found.errors(), 1):
            error, size = error + lost, size + own
            update(number, len(found.experts))
    return Compressed(options.method, len(found.experts), found.bytes(), error / max(size, 1e-30))


def compress_model(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    calibration: str | Path | None = None,
    **how: Unpack[Writing],
) -> Compressed | Sliced:
    """Write the checkpoint at `out`; how: see `Writing`. Raises UsageError, DoesNotFit or CorruptError before anything is visible there.

    calibration: a folder written by `calibrate` with the collectors that a ranking of neurons needs, instead of the text of the options.

    >>> import moe_prism
    >>> done = moe_prism.compress_model("nano", "int8", moe_prism.CompressOptions(method="rtn:bits=8"))
    >>> done.to_json()["method"]
    'rtn:bits=8'
    """
    options = options or CompressOptions()
    if neurons := _neurons(options, calibration):
        how.setdefault("report", silent)
        return write_slice(model, out, neurons, options, calibration, **how)
    found, weights = _packed(model, options)
    check_apart(weights.path, out)
    asked = {"method": options.method, "format": options.format}
    inputs = {"source": source_facts(weights.path), "compression": asked}
    result = Compressed(options.method, len(found.experts), found.bytes(), folder=Path(out))
    if (resume := how.get("resume", False)) and (done := finished(out, {"kind": KIND, **inputs})):
        return Compressed(**{**result.__dict__, "manifest": done})
    before, after = found.bytes()
    size = max(after, written_bytes(weights) - before + after)
    begin(needed_by_rewriting(weights, size), out, resume=resume, force=how.get("force", False))
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        journal = Journal(folder.work, inputs)
        with how.get("report", silent)("write") as update:
            found.write(folder, journal, update)
        plain = {"dequantized": weights.dequantized} if weights.dequantized else {}
        manifest = write_manifest(folder, {"kind": KIND, **inputs, "companions": weights.companions, **plain})
        folder.finish()
    return Compressed(**{**result.__dict__, "manifest": manifest})


def _neurons(options: CompressOptions, calibration: str | Path | None) -> NeuronMethod | None:
    """The method that ranks neurons, if it is one. UsageError for options that mean nothing to it."""
    options.check()
    found = method(options.method)
    if isinstance(found, NeuronMethod):
        return found
    options.check_codec()
    if calibration:
        raise UsageError(
            f"--calibration means nothing to '{options.method}'", "leave it out, or give a method that ranks neurons"
        )
    return None


def _packed(model: str | Path, options: CompressOptions) -> tuple[PackedCheckpoint, Weights]:
    chosen = method(options.method)
    codec = chosen.codec() if isinstance(chosen, UniformBits) else None
    if not isinstance(codec, Rtn):
        raise UsageError(
            f"'{options.method}' has no form in {options.format}",
            "give rtn:bits=4 or rtn:bits=8, or what ranks neurons, such as heapr; `frontier --methods` measures any",
        )
    weights = Weights(resolve(model))
    if weights.stream is None:
        raise UsageError("a GGUF file is not written again", "quantize it with the tool that wrote it")
    asked = chosen.parameters
    if not asked.bits:
        raise UsageError(f"'{options.method}' does not say how many bits", "give rtn:bits=4 or rtn:bits=8")
    packing = Packing(codec, int(asked.bits), asked.group or codec.groups[0])
    codec.check(packing.bits, packing.group)
    return PackedCheckpoint(weights.stream, weights.layers, packing), weights

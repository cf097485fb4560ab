"""Write a checkpoint whose experts take fewer bits, or only say what that would save and lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..checkpoint import Journal, OutputFolder, source_facts, write_manifest
from ..compress.codec.rtn import Rtn
from ..compress.quantize.write import PackedCheckpoint, Packing
from ..errors import UsageError
from ..methods.find import method
from ..methods.quantize.uniform_bits import UniformBits
from ..model import resolve
from ..options.compress import CompressOptions
from ..progress import Report, peak_rss_bytes, silent
from .resources import check_resources, needed_on_disk, written_bytes

KIND = "quantized"


@dataclass(frozen=True)
class Compressed:
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


def plan_compression(model: str | Path, options: CompressOptions | None = None) -> Compressed:
    """What would be written; no weight is read."""
    options = options or CompressOptions()
    found, _ = _packed(model, options)
    return Compressed(options.method, len(found.experts), found.bytes())


def measure_compression(model: str | Path, options: CompressOptions | None = None, *, report: Report = silent) -> Compressed:
    """The same, and how far the weights would move; nothing is written."""
    options = options or CompressOptions()
    found, _ = _packed(model, options)
    error = size = 0.0
    with report("encode") as update:
        for number, (_, lost, own) in enumerate(found.errors(), 1):
            error, size = error + lost, size + own
            update(number, len(found.experts))
    return Compressed(options.method, len(found.experts), found.bytes(), error / max(size, 1e-30))


def compress_model(
    model: str | Path, out: str | Path, options: CompressOptions | None = None, **how: Unpack[Writing]
) -> Compressed:
    """Write the checkpoint at `out`; how: see `Writing`. Raises UsageError, DoesNotFit or CorruptError before anything is visible there."""
    options = options or CompressOptions()
    found, weights = _packed(model, options)
    check_apart(weights.path, out)
    inputs = {"source": source_facts(weights.path), "compression": asdict(options)}
    result = Compressed(options.method, len(found.experts), found.bytes(), folder=Path(out))
    if (resume := how.get("resume", False)) and (done := finished(out, {"kind": KIND, **inputs})):
        return Compressed(**{**result.__dict__, "manifest": done})
    before, after = found.bytes()
    check_resources(needed_on_disk(max(after, written_bytes(weights) - before + after)), out, resume)
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        journal = Journal(folder.work, inputs)
        with how.get("report", silent)("write") as update:
            found.write(folder, journal, update)
        plain = {"dequantized": weights.dequantized} if weights.dequantized else {}
        manifest = write_manifest(folder, {"kind": KIND, **inputs, "companions": weights.companions, **plain})
        folder.finish()
    return Compressed(**{**result.__dict__, "manifest": manifest})


def _packed(model: str | Path, options: CompressOptions) -> tuple[PackedCheckpoint, Weights]:
    options.check()
    chosen = method(options.method)
    codec = chosen.codec() if isinstance(chosen, UniformBits) else None
    if not isinstance(codec, Rtn):
        raise UsageError(
            f"'{options.method}' has no form in {options.format}",
            "give rtn:bits=4 or rtn:bits=8; `frontier --methods` measures any",
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

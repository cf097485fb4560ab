"""Write an elastic model's sub-experts as experts of their own: an ordinary checkpoint, whose router can then be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..checkpoint import Journal, OutputFolder, elastic_manifest, source_facts, write_manifest
from ..compress.reslice.form import Sizes
from ..compress.reslice.write import ReslicedCheckpoint
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..progress import peak_rss_bytes, silent
from ..result import Result
from .rehearsal import begin
from .reslice_card import resliced_card
from .resources import needed_by_rewriting

KIND = "resliced"


@dataclass(frozen=True)
class Resliced(Result):
    """The folder and its manifest. facts: experts, experts_per_token, width, n_sub, and the factor of W_down."""

    folder: Path
    manifest: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `refactor --reslice --json` prints."""
        left = self.manifest["companions"]["left_out"]
        return {"folder": str(self.folder), **self.manifest["reslicing"], "left_out": left, "peak_rss_bytes": peak_rss_bytes()}


def reslice(folder: str | Path, out: str | Path, **how: Unpack[Writing]) -> Resliced:
    """Write an elastic folder as a checkpoint of the same family with N times as many experts, each 1/N as wide, k N per token.

    Router rows stand N times, and W_down is multiplied by what makes the N of an expert add up to it (arXiv 2510.19366, the linear gate).
    The function is the source's at k N. UsageError, DoesNotFit or CorruptError before anything is visible, for a folder that is not
    elastic and for a family whose router or configuration cannot express it.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=1024, length=256)
    >>> _ = moe_prism.refactor("nano", "cut-nano", moe_prism.RefactorOptions(calibration=few, profile_tokens=0))
    >>> found = moe_prism.reslice("cut-nano", "resliced-nano").to_json()
    >>> found["experts"], found["experts_per_token"], found["factor"]
    (128, 16, 4)
    """
    manifest, resume, force = elastic_manifest(folder), how.get("resume", False), how.get("force", False)
    check_apart(folder, out)
    if manifest.get("weights_file") or manifest.get("kept_format") or manifest.get("adopted"):
        raise UsageError(
            f"'{folder}' holds its weights in a format of its own", "refactor without --keep-format, from safetensors"
        )
    if manifest.get("recovery"):
        raise UsageError(
            f"'{folder}' has side tensors from `recover`, which this form has no place for", "give the refactored folder"
        )
    weights = Weights(Path(folder))
    weights.check_rewritable()
    assert weights.stream is not None
    layers, n_sub = weights.layers, int(manifest["n_sub"])
    shapes = {(layer.num_experts, layer.width, experts_per_token(weights.model, layer)) for layer in layers}
    if len(shapes) > 1:
        raise UsageError("layers differ in their experts, and config.json has one number for all", "keep the elastic form")
    experts, width, per_token = shapes.pop()
    writer = ReslicedCheckpoint(weights.stream, layers, Sizes(experts, per_token, width, n_sub))
    facts = {
        "n_sub": n_sub,
        "experts": experts * n_sub,
        "experts_per_token": per_token * n_sub,
        "width": width // n_sub,
        "factor": writer.factor,
    }
    inputs = {"kind": KIND, "source": source_facts(folder), "reslicing": facts}
    if resume and (done := finished(out, inputs)):
        return Resliced(Path(out), done)
    begin(needed_by_rewriting(weights, writer.bytes()), out, resume=resume, force=force)
    with OutputFolder(out, resume=resume, force=force) as output:
        with how.get("report", silent)("write") as update:
            writer.write(output, Journal(output.work, inputs), update)
        about = {
            **inputs,
            "companions": weights.companions,
            "calibration": manifest["calibration"],
            "documents": manifest["calibration"]["documents"],
        }
        output.write_bytes("README.md", resliced_card(about, weights.model.config.model_type).encode())
        written = write_manifest(output, about)
        output.finish()
    return Resliced(Path(out), written)

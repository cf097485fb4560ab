"""Write a checkpoint whose experts were merged, or joined by neurons of others, or only say what would become of them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from ..artefact.output import Writing, check_apart, finished
from ..checkpoint import Journal, OutputFolder, write_manifest
from ..compress.edit import Edit
from ..compress.in_place import EditedCheckpoint
from ..compress.prune.remove import Removal, check_mtp_choice, check_removable, remove_experts
from ..compress.slice.protect import shields
from ..errors import UsageError
from ..methods.merge.base import MergeMethod, routed_layers
from ..options.compress import CompressOptions
from ..point import NamedPoint, OperatingPoint
from ..progress import Report
from .calibrate import discard_snapshots
from .fitting import Fitting, Refitted, least_tokens
from .merge_card import merged_card
from .rehearsal import begin
from .resources import needed_by_merging

KIND = "merged"
POINT = "point.json"


@dataclass(frozen=True)
class Merged(Refitted):
    """What became of experts that were merged."""

    counted = "experts"


class Merging(Fitting):
    """One model, the method that merges its experts, and the text of the pass if there has to be one."""

    def __init__(self, model: str | Path, method: MergeMethod, options: CompressOptions, calibration: str | Path | None) -> None:
        self.method, self.keep = method, asked_share(method, options)
        super().__init__(model, options, sorted({*method.collectors, *(["outputs"] if options.protect else [])}), calibration)
        layers = self.weights.layers
        if method.removes:
            check_mtp_choice(self.stream, layers, None)
        shields(layers, [], [], self.pins)
        self.layers = routed_layers(self.weights.model, layers, [{} for _ in layers])
        method.check(self.layers, self.keep)
        self.output = EditedCheckpoint(self.stream, layers)
        self.read_text()

    def bytes(self) -> tuple[int, int]:
        """Of the experts, in the files: before, and after."""
        before, after = self.output.bytes()
        facts = self.planned()
        return before, after * facts["written"] // facts["of"]

    def needed(self) -> dict[str, Any]:
        """Memory and disk of the run."""
        before, after = self.bytes()
        size = (self.weights.written_bytes or 0) - before + after
        return needed_by_merging(self.weights, self.options.calibration if self.windows else None, size)

    def planned(self) -> dict[str, Any]:
        """What is known before anything was measured."""
        experts = [own.layer.num_experts for own in self.layers]
        stay = self.method.experts_share(self.keep) if self.method.removes else 1
        written = [round(stay * n) for n in experts]
        return {"asked": self.keep, "share": self.keep, "of": max(experts), "written": max(written)}

    def select(self, folder: OutputFolder, journal: Journal, report: Report) -> tuple[Edit, dict[str, Any]]:
        """The edit, and the facts of it. A layer in memory at a time."""
        statistics = self.gathered(folder, journal, report)
        values = self.values(statistics)
        layers = [own._replace(values=more) for own, more in zip(self.layers, values, strict=True)]
        protected = [mask[:, 0] for mask in shields(self.weights.layers, values, self.options.protect, self.pins)]
        plans, settled = self.method.plans(layers, self.keep, protected), []
        with report("merge") as update, torch.no_grad():
            for number, (plan, own) in enumerate(zip(plans, layers, strict=True), 1):
                with self.weights.loaded(own.layer):
                    settled.append(self.method.settled(plan, own))
                update(number, len(layers))
        edit = self.method.edit(settled)
        stored = {"stored_once": edit.resident_share, "least_tokens": least_tokens(statistics)}
        return edit, {**self.planned(), **stored, "protected": sum(int(mask.sum()) for mask in protected)}

    def write(self, edit: Edit, folder: OutputFolder, journal: Journal, report: Report) -> None:
        """The shards, with fewer experts where the edit says so."""
        with report("write") as update:
            if edit.staying is None:
                self.output.write(edit, folder, journal, update)
                return
            check_removable(edit.staying)
            removal = Removal(None, update, lambda number, layer: edit.edit(number, layer))
            remove_experts(self.stream, self.weights.layers, edit.staying, folder, journal, removal)


def plan_merge(model: str | Path, method: MergeMethod, options: CompressOptions, calibration: str | Path | None) -> Merged:
    """What would be written; no weight is read."""
    job = Merging(model, method, options, calibration)
    return Merged(options.method, job.bytes(), job.planned(), job.needed())


def measure_merge(
    model: str | Path, method: MergeMethod, options: CompressOptions, calibration: str | Path | None, report: Report
) -> Merged:
    """The same after the pass; nothing is written."""
    job = Merging(model, method, options, calibration)
    needed = job.needed()
    begin(needed)
    with tempfile.TemporaryDirectory() as scratch, OutputFolder(Path(scratch) / "selection") as folder:
        _, facts = job.select(folder, Journal(folder.work, {}), report)
    return Merged(options.method, job.bytes(), facts, needed)


def write_merge(
    model: str | Path,
    out: str | Path,
    method: MergeMethod,
    options: CompressOptions,
    calibration: str | Path | None,
    **how: Unpack[Writing],
) -> Merged:
    """Write the checkpoint at `out`. Raises UsageError, DoesNotFit or CorruptError before anything is visible there."""
    job = Merging(model, method, options, calibration)
    weights, resume, force = job.weights, how.get("resume", False), how.get("force", False)
    check_apart(weights.path, out)
    inputs = job.inputs
    result = Merged(options.method, job.bytes(), {}, job.needed(), Path(out))
    if resume and (done := finished(out, {"kind": KIND, **inputs})):
        return replace(result, facts=done["result"], manifest=done)
    begin(result.needed, out, resume=resume, force=force)
    with OutputFolder(out, resume=resume, force=force) as folder:
        report = how["report"]
        journal = Journal(folder.work, inputs)
        edit, facts = job.select(folder, journal, report)
        job.write(edit, folder, journal, report)
        name = f"{method.point_name(job.keep)}-written"
        folder.write_bytes(POINT, NamedPoint(name=name, point=OperatingPoint(weights=edit.part())).encoded())
        plain = {"dequantized": weights.dequantized} if weights.dequantized else {}
        about = {
            "kind": KIND,
            **inputs,
            "companions": weights.companions,
            **plain,
            "result": facts,
            "documents": list(job.documents),
        }
        folder.write_bytes("README.md", merged_card(about, method.name, weights.model.config.model_type).encode())
        discard_snapshots(folder)
        manifest = write_manifest(folder, about)
        folder.finish()
    return replace(result, facts=facts, manifest=manifest)


def asked_share(method: MergeMethod, options: CompressOptions) -> float:
    """The share of the experts, by --keep or by the method's name. UsageError for none or two."""
    asked = method.parameters.keep
    if options.keep is not None and asked:
        raise UsageError(f"both --keep {options.keep:g} and '{method.name}' say how many experts stay", "give one of them")
    share = options.keep or asked
    if not share:
        raise UsageError(f"'{method.name}' does not say how many experts stay", "add --keep 0.75")
    return share

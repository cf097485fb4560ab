"""Write a checkpoint without some of its experts, or only say which would go."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.load import SIDE_FILE, flat_side_tensors, read_tensors, side_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.statistics import Statistics
from ..checkpoint import Journal, OutputFolder, read_manifest, source_facts, write_manifest
from ..checkpoint.manifest import MANIFEST
from ..compress.prune import KeptExperts
from ..compress.prune.keep_format import remove_quantized
from ..compress.prune.remove import Removal, check_mtp_choice, check_removable, remove_experts
from ..compress.prune.substitute import check_substitutable, substitute_experts
from ..data import Windows
from ..elastic import attach
from ..elastic.side_tensors import expert_dimension
from ..errors import CorruptError, UsageError
from ..methods.prune.select import (
    PruneSelection,
    check_options,
    collectors_of,
    decide,
    form_of,
    measured_counts,
    read_kept,
    with_constants,
)
from ..model import find_layers, load_to_run, resolve
from ..model.place import recorded
from ..options.prune import PruneOptions
from ..progress import Report, peak_rss_bytes, silent
from ..result import Result
from .calibrate import calibration_windows, check_fit, check_fits, discard_snapshots, lasts, read_statistics, run_pass
from .prune_card import pruned_card
from .recovered import FILLED_IN
from .rehearsal import begin
from .resources import needed_by_pass, needed_by_rewriting, written_bytes
from .which_text import with_text

KEPT = "kept.json"
COUNTS = "kept-counts.safetensors"


@dataclass(frozen=True)
class Pruned(Result):
    """The selection, and where a model was written: its folder and manifest."""

    selection: PruneSelection
    folder: Path | None
    manifest: Mapping[str, Any] | None
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        where = {"folder": str(self.folder)} if self.folder else {}
        left = {"left_out": self.manifest["companions"]["left_out"]} if self.manifest else {}
        return {**where, **self.selection.to_json(), **left, "peak_rss_bytes": self.peak_rss_bytes}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per layer: its experts, and how many of them stay."""
        rows = self.selection.to_json()["layers"]
        return [{"layer": row["layer"], "experts": row["experts"], "kept": len(row["kept"])} for row in rows]


def select_experts(
    model: str | Path, options: PruneOptions | None = None, *, calibration: str | Path | None = None, report: Report = silent
) -> Pruned:
    """Which experts would stay; nothing is written. `compress.prune.pruned(model, result.selection.choices)` runs it in mask mode.

    >>> import moe_prism
    >>> asked = moe_prism.PruneOptions(criterion="random", keep=0.5)
    >>> [row["kept"] for row in moe_prism.select_experts("nano", asked).to_records()]
    [16, 16, 16, 16, 16, 16]
    """
    options = options or PruneOptions()
    check_options(options)
    job = _Job(model, options, calibration)
    with tempfile.TemporaryDirectory() as scratch, OutputFolder(Path(scratch) / "selection") as folder:
        selection = job.select(folder, Journal(folder.work, {}), report)
    return Pruned(selection, None, None, peak_rss_bytes())


def prune_model(
    model: str | Path,
    out: str | Path,
    options: PruneOptions | None = None,
    *,
    calibration: str | Path | None = None,
    kept: str | Path | None = None,
    **how: Unpack[Writing],
) -> Pruned:
    """Write a checkpoint with fewer experts per layer, which unmodified transformers loads; kept.json says which stayed. With constants in
    the place of experts vLLM loads it, and `load_model`.

    model: a safetensors folder, plain or written by `refactor` (the result is then elastic too). calibration: a folder written by
    `calibrate` with the collectors that the criterion needs. kept: a kept.json instead of a criterion. how: see
    `Writing`. Raises UsageError, DoesNotFit or CorruptError before anything is visible at `out`.

    >>> import moe_prism
    >>> asked = moe_prism.PruneOptions(criterion="random", keep=0.5)
    >>> moe_prism.prune_model("nano", "half", asked).to_json()["resident_share"]
    0.5
    """
    options = options or PruneOptions()
    check_options(options)
    job = _Job(model, options, calibration, writes=True)
    options = job.options
    check_apart(job.weights.path, out)
    if job.weights.stream is None:
        raise UsageError("a GGUF file is not written again", "load it with transformers' gguf_file=, save_pretrained, prune that")
    form = form_of(options)
    if kept is None and form == "removed" and options.allocation != "layer":
        raise UsageError(
            f"--allocation {options.allocation} gives layers different numbers of experts, transformers has one for all",
            "use --allocation layer, --form constant, or --report-only and mask mode",
        )
    given = read_kept(kept, job.weights.model, job.weights.layers) if kept else None
    if given and form == "removed":
        check_removable(given.choices)
    manifest = _elastic_manifest(job.weights.path)
    inputs = {"source": source_facts(job.weights.path), "options": recorded(options), "given": given.to_json() if given else None}
    statistics = {"statistics": job.given.facts if job.given and not given else None}
    kind = "elastic" if manifest else "pruned"
    if (resume := how.get("resume", False)) and (done := finished(out, {"kind": kind, "pruning": {**inputs, **statistics}})):
        selection = read_kept(Path(out) / KEPT, job.weights.model, job.weights.layers)
        return Pruned(selection, Path(out), done, peak_rss_bytes())
    size, runs = written_bytes(job.weights), job.windows and (form == "constant" or not given)
    needed = needed_by_pass(job.weights, job.settings, size) if runs else needed_by_rewriting(job.weights, size)
    simple = runs and options.allocation != "measured"
    forecast = partial(lasts, job.weights.path, job.windows, job.settings, needed) if simple and job.windows else None
    begin(needed, out, resume=resume, force=how.get("force", False), lasts=forecast)
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        report = how.get("report", silent)
        journal = Journal(folder.work, {**inputs, **statistics})
        selection = job.repeat(given, folder, journal, report) if given else job.select(folder, journal, report)
        write = substitute_experts if form == "constant" else remove_quantized if options.keep_format else remove_experts
        with report("write") as update:
            write(job.weights.stream, job.weights.layers, selection.choices, folder, journal, Removal(options.mtp, update))
        if manifest:
            _slice_side_file(job.weights.path, selection.choices, folder)
        folder.write_bytes(KEPT, json.dumps(selection.to_json(), indent=1).encode() + b"\n")
        facts = _facts(manifest, selection, {**inputs, **statistics}, job, kind)
        folder.write_bytes("README.md", pruned_card(facts, selection.to_json(), job.weights.model.config.model_type).encode())
        discard_snapshots(folder)
        folder.discard(COUNTS)
        written = write_manifest(folder, facts)
        folder.finish()
    return Pruned(selection, Path(out), written, peak_rss_bytes())


class _Job:
    """One model, what is known of it, and the text of the pass if there has to be one."""

    def __init__(self, model: str | Path, options: PruneOptions, calibration: str | Path | None, writes: bool = False) -> None:
        where = resolve(model)
        self.options = options = replace(options, calibration=with_text(options.calibration, where))
        self.weights = Weights(where, options.dtype, "codes" if options.keep_format else None)
        if writes and self.weights.stream:
            self.weights.check_rewritable()
            check_mtp_choice(self.weights.stream, self.weights.layers, options.mtp)
            if form_of(options) == "constant":
                check_substitutable(self.weights.stream, self.weights.layers, options.mtp)
        self.given = read_statistics(calibration) if calibration else None
        if self.given and self.given.facts["source"] != source_facts(self.weights.path):
            raise UsageError(
                f"'{calibration}' was calibrated on another checkpoint", "calibrate this one, or leave --calibration out"
            )
        if self.given:
            check_fits(self.given, self.weights)
        tried = replace(options, criterion="first-half", protect=[], form=form_of(options))
        decide(self.weights.model, self.weights.layers, None, tried)  # would it fit at all
        collectors = collectors_of(options)
        self.settings = replace(options.calibration, collectors=collectors)
        self.windows: Windows | None = None
        if collectors and not self.given:
            unnamed = [name for name in options.for_domain if name not in options.calibration.source.domains]
            if unnamed:
                raise UsageError(f"--for-domain {unnamed[0]} is no domain of the text", f"name it: --domain {unnamed[0]}=PATH")
            self.windows = calibration_windows(self.weights.path, self.settings)
            check_fit(self.weights, self.settings)

    @property
    def documents(self) -> Sequence[str]:
        """SHA-256 of the calibration documents that were used."""
        if self.windows:
            return self.windows.documents
        return self.given.facts["documents"] if self.given else ()

    def repeat(self, given: PruneSelection, folder: OutputFolder, journal: Journal, report: Report) -> PruneSelection:
        """A selection from a file, with the constants that are to be written, if there are."""
        form = form_of(self.options)
        if form == "removed":
            return given
        statistics = self._statistics(folder, journal, report)
        assert statistics is not None
        choices = [replace(choice, groups=None, masked=False) for choice in given.choices]
        return replace(given, choices=tuple(with_constants(choices, statistics)), facts={**given.facts, "form": form})

    def _statistics(self, folder: OutputFolder, journal: Journal, report: Report) -> Statistics | None:
        if self.windows is None:
            return self.given
        return run_pass(self.weights.path, self.windows, self.settings, folder, journal, report)

    def select(self, folder: OutputFolder, journal: Journal, report: Report) -> PruneSelection:
        statistics = self._statistics(folder, journal, report)
        counts = self._counts(statistics, folder, journal, report) if self.options.allocation == "measured" else None
        return decide(self.weights.model, self.weights.layers, statistics, self.options, counts)

    def _counts(self, statistics: Statistics | None, folder: OutputFolder, journal: Journal, report: Report) -> list[int]:
        """Experts per layer by measurement, a unit of the journal."""
        assert statistics is not None
        if not journal.done(COUNTS):
            loaded = load_to_run(self.weights.path)
            elastic = attach(loaded, 1, layers=find_layers(loaded))
            ids = statistics.profile
            wanted = max(1, self.options.profile_tokens // ids.shape[1])
            with report("profile") as update:
                found = measured_counts(
                    loaded, elastic, statistics, self.options, ids[:: max(1, len(ids) // wanted)][:wanted], update
                )
            journal.finish(COUNTS, folder.save_tensors(COUNTS, {"counts": torch.tensor(found)}))
        counts = read_tensors(folder.work / COUNTS).get("counts")
        if counts is None or counts.dtype != torch.int64 or counts.shape != (len(self.weights.layers),) or int(counts.min()) < 1:
            raise CorruptError(
                f"{folder.work / COUNTS}: 'counts' must be a number of experts per layer", "use --force to start again"
            )
        return counts.tolist()


def _elastic_manifest(folder: Path) -> dict[str, Any] | None:
    """prism.json of a folder that `refactor` or `recover` wrote, None for any other model."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    return manifest if manifest.get("kind") == "elastic" else None


def _slice_side_file(source: Path, choices: Sequence[KeptExperts], out: OutputFolder) -> None:
    """prism.safetensors without what belongs to experts that went."""
    own = side_tensors(source, len(choices))
    left = [
        {name: _slice(name, tensor, choice) for name, tensor in tensors.items()}
        for tensors, choice in zip(own, choices, strict=True)
    ]
    out.save_tensors(SIDE_FILE, flat_side_tensors(left), {"format": "pt"})


def _slice(name: str, tensor: Tensor, choice: KeptExperts) -> Tensor:
    dim = expert_dimension(name)
    if dim is None:
        return tensor
    if tensor.shape[dim] != choice.experts:
        raise UsageError(f"side tensor '{name}' does not fit the model", "prune the source model, then refactor that")
    return tensor.index_select(dim, torch.tensor(choice.kept))


def _facts(
    manifest: Mapping[str, Any] | None, selection: PruneSelection, inputs: Mapping[str, Any], job: _Job, kind: str
) -> dict[str, Any]:
    """prism.json: of an elastic model its own facts with fewer experts, else what was done."""
    beside = job.weights.companions
    plain = {"dequantized": job.weights.dequantized} if job.weights.dequantized else {}
    if manifest is None:
        return {
            "kind": kind,
            "source": inputs["source"],
            "companions": beside,
            **plain,
            "pruning": dict(inputs),
            "documents": list(job.documents),
        }
    gone = {*FILLED_IN, "operating_points", "adopted"} | (set() if job.options.keep_format else {"kept_format"})
    old = {key: value for key, value in manifest.items() if key not in gone}
    if plain:
        old |= plain | {"bytes_per_weight": job.weights.bytes_per_weight}
    layers = [
        {**row, "experts": len(c.kept), "starved": [c.kept.index(e) for e in row["starved"] if e in c.kept]}
        for row, c in zip(old["layers"], selection.choices, strict=True)
    ]
    calibration = {**old["calibration"], "documents": list(dict.fromkeys([*old["calibration"]["documents"], *job.documents]))}
    return {**old, "companions": beside, "layers": layers, "calibration": calibration, "pruning": dict(inputs)}

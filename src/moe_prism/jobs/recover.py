"""Win back quality that dropped blocks cost, without touching the model at full budget."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from torch import Tensor

from ..artefact.load import SIDE_FILE, flat_side_tensors, read_tensors, side_tensors
from ..artefact.open import open_model
from ..artefact.output import Writing, check_apart, finished
from ..artefact.streamed import open_streamed
from ..checkpoint import Journal, OutputFolder, elastic_manifest, write_manifest
from ..checkpoint.manifest import REMEASURED
from ..data import Windows, token_windows
from ..elastic.layer import ElasticLayer
from ..elastic.side_tensors import check_values
from ..errors import CorruptError, UsageError
from ..forecast.work_time import Seconds
from ..model.place import recorded
from ..options.recover import RecoverOptions
from ..options.text import other_source
from ..progress import Report, peak_rss_bytes, silent
from ..recover import RecoverJob, methods
from ..recover.run import BATCH, groups
from .recover_router import recover_router
from .recovered import FILLED_IN, Recovered
from .rehearsal import begin
from .resources import needed_by_recovery

MEASURED = REMEASURED  # of the model as it was


def recover_model(
    folder: str | Path, out: str | Path, options: RecoverOptions | None = None, **how: Unpack[Writing]
) -> Recovered:
    """Write a copy of an elastic model that loses less below full budget, with the same weights and the same function at full budget.

    Of two methods, `predictor` goes first: a repair is fitted to what is kept. `router` takes a folder of `reslice` instead, and writes
    another model (see `recover_router`). how: see `Writing`; an interrupted `repair` or `router` continues, `predictor` starts again.
    Raises UsageError, DoesNotFit or CorruptError before OUT is visible.

    >>> import moe_prism
    >>> asked = moe_prism.RecoverOptions(method="repair", tokens=2048, length=128)
    >>> moe_prism.recover_model("elastic", "repaired", asked).to_json()["resident_share"] > 0
    True
    """
    options, resume = options or RecoverOptions(), how.get("resume", False)
    options.check()
    if options.method == "router":
        return recover_router(folder, out, options, **how)
    manifest = elastic_manifest(folder)
    _check(folder, manifest, options)
    check_apart(folder, out)
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    inputs = {"from": weights, "options": recorded(options)}
    done = finished(out, {"kind": "elastic"}) if resume else None
    if done and done.get("recovery", [{}])[-1].get("inputs") == inputs:
        return Recovered(Path(out), done, peak_rss_bytes())
    opening = open_streamed(folder) if options.low_memory else nullcontext(open_model(folder))
    with opening as opened:
        model = opened.model
        windows = _windows(opened.tokenizer, model, manifest, options)
        _check_repair(model._moe_prism.layers, windows, options)
        needed = needed_by_recovery(model, windows.ids, options, _written_bytes(model, manifest, options))
        begin(needed, out, resume=resume, force=how.get("force", False), lasts=partial(_lasts, model, windows, options, needed))
        return _write(Path(folder), out, _Task(model, windows, manifest, options, inputs), how)


def _lasts(model: Any, windows: Windows, options: RecoverOptions, needed: Mapping[str, Any]) -> Seconds | None:
    from .job_times import repair_time  # a real run wants none of it

    return repair_time(model, windows, options, needed["disk_bytes"])


class _Task(NamedTuple):
    """What is recovered, from what text, and what the journal knows it by."""

    model: Any
    windows: Windows
    manifest: Mapping[str, Any]
    options: RecoverOptions
    inputs: Mapping[str, Any]


def _write(folder: Path, out: str | Path, task: _Task, how: Writing) -> Recovered:
    model, windows, manifest, options, inputs = task
    report = how.get("report", silent)
    with OutputFolder(out, resume=how.get("resume", False), force=how.get("force", False)) as output:
        facts = _fit(model, windows, manifest, options, _Units(output, Journal(output.work, inputs)), report)
        with report("write") as update:
            _copy(folder, manifest, output, update)
        extra = _write_side_file(folder, len(manifest["layers"]), output)
        facts |= {"inputs": inputs, **windows.facts(), "tokens": windows.tokens, "resident_bytes": extra}
        facts["resident_share"] = round(extra / _expert_bytes(model, manifest), 4)
        result = write_manifest(output, _manifest(manifest, windows, facts))
        output.finish()
    return Recovered(Path(out), result, peak_rss_bytes())


def _check(folder: str | Path, manifest: Mapping[str, Any], options: RecoverOptions) -> None:
    had = [step["method"] for step in manifest.get("recovery", [])]
    if options.method in had:
        raise UsageError(f"'{folder}' has had --method {options.method} already", "give the folder it was made from")
    if "repair" in had:
        raise UsageError(f"'{folder}' is repaired, and a repair is fitted to its predictor", "train the predictor first")


def _windows(tokenizer: Any, model: Any, manifest: Mapping[str, Any], options: RecoverOptions) -> Windows:
    text = other_source(manifest["calibration"], options.text, options.text_field)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or options.length
    return token_windows(tokenizer, text, "calibration", length=min(options.length, longest), tokens=options.tokens)


def _check_repair(layers: Sequence[ElasticLayer], windows: Windows, options: RecoverOptions) -> None:
    """UsageError or DoesNotFit, before anything is written, where `repair` could not work."""
    if options.method == "repair":
        if len(windows.ids) < BATCH:
            raise UsageError(
                f"{len(windows.ids)} windows are too few: one in {BATCH} is held out", "give more --tokens or a smaller --length"
            )
        groups(layers, min(options.bands, layers[0].parts.n_sub - 1), options.memory_mib << 20)


def _written_bytes(model: Any, manifest: Mapping[str, Any], options: RecoverOptions) -> int:
    """Of the copy, with what `repair` adds to it: once in units, once in prism.safetensors."""
    layers = [layer.parts.layer for layer in model._moe_prism.layers]
    bands = options.bands if options.method == "repair" else 0
    added: int = sum(bands * layer.num_experts * layer.hidden * layer.width * 2 for layer in layers)
    whole: int = sum(entry["bytes"] for entry in manifest["files"].values())
    return whole + 2 * added


class _Units(NamedTuple):
    """Side tensors of layers, finished one by one in the work folder."""

    output: OutputFolder
    journal: Journal

    def done(self, layer: int) -> bool:
        return self.journal.done(_unit(layer))

    def save(self, layer: int, tensors: dict[str, Tensor]) -> None:
        named = {f"layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        self.journal.finish(_unit(layer), self.output.save_tensors(_unit(layer), named))


def _fit(
    model: Any, windows: Windows, manifest: Mapping[str, Any], options: RecoverOptions, units: _Units, report: Report
) -> dict[str, Any]:
    """Run the method; side tensors of every layer are then units in the work folder. Returns its facts."""
    found = [layer.get("sensitivity") for layer in manifest["layers"]]
    job = RecoverJob(
        model=model,
        elastic=model._moe_prism,
        ids=windows.ids,
        sensitivity=None if None in found else found,
        bands=options.bands,
        steps=options.steps,
        memory_bytes=options.memory_mib << 20,
        seed=options.seed,
        done=units.done,
        save=units.save,
        report=report,
    )
    return {"method": options.method, **methods.get(options.method)(job)}


def _write_side_file(folder: Path, layers: int, output: OutputFolder) -> int:
    """prism.safetensors with the new side tensors in it; work files leave. Returns the bytes it grew by."""
    old = flat_side_tensors(side_tensors(folder, layers))
    new = dict(old)
    for i in range(layers):
        own = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in read_tensors(output.work / _unit(i)).items()}
        check_values(str(output.work / _unit(i)), own)
        new |= {f"layers.{i}.{name}": tensor for name, tensor in own.items()}
        output.discard(_unit(i))
    output.save_tensors(SIDE_FILE, new, {"format": "pt"})
    return sum(t.nbytes for t in new.values()) - sum(t.nbytes for t in old.values())


def _unit(layer: int) -> str:
    return f"repair-{layer:03d}.safetensors"


def _copy(folder: Path, manifest: Mapping[str, Any], output: OutputFolder, update: Any) -> None:
    """Every file of the elastic model but what is written anew or was measured on the model as it was."""
    names = [name for name in sorted(manifest["files"]) if name not in (*MEASURED, SIDE_FILE, *manifest.get("caches", ()))]
    output.require_space(sum(manifest["files"][name]["bytes"] for name in names))
    for done, name in enumerate(names, 1):
        with (folder / name).open("rb") as source, output.stage(name) as file:
            shutil.copyfileobj(source, file)
        if output.hashes[name] != manifest["files"][name]["sha256"]:
            raise CorruptError(f"{folder / name} was changed (sha256 differs)", "restore the folder, or refactor again")
        update(done, len(names))


def _expert_bytes(model: Any, manifest: Mapping[str, Any]) -> int:
    layers = [layer.parts.layer for layer in model._moe_prism.layers]
    size: int = manifest["bytes_per_weight"]
    weights: int = sum(layer.num_experts * layer.parameters_per_expert() for layer in layers)
    return size * weights


def _manifest(old: Mapping[str, Any], windows: Windows, recovery: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the elastic model, with what was done to it. Text used here is calibration text too: no frontier may use it."""
    kept = {key: value for key, value in old.items() if key not in (*FILLED_IN, "operating_points", "caches")}
    documents = dict.fromkeys([*old["calibration"]["documents"], *windows.documents])
    calibration = {**old["calibration"], "documents": list(documents)}
    return {**kept, "calibration": calibration, "recovery": [*old.get("recovery", []), dict(recovery)]}

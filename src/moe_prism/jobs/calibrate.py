"""Calibrate a checkpoint: one pass, resumable, in memory or one decoder layer at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.load import read_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.layerwise import WHOLE, LayerwisePass
from ..calibrate.options import settings
from ..calibrate.run import Pass, batches, bounded_capacity
from ..calibrate.statistics import LayerStatistics, Statistics, StoredLayers
from ..checkpoint import Journal, LayerStream, OutputFolder, check_listed, read_manifest, source_facts, write_manifest
from ..checkpoint.config import read_config
from ..data import Windows, token_windows
from ..errors import CorruptError, UsageError
from ..forecast.work_time import Seconds
from ..model import MoELayer, find_layers, load_to_run, load_tokenizer, resolve
from ..model.place import recorded
from ..options.calibrate import CalibrateOptions
from ..progress import Report, silent
from ..schema.read import one_line
from .demonstrations import Answering, plan
from .expert_memory import MAPPED, needed_by_calibration
from .refactor_units import Shard
from .rehearsal import begin, check_early
from .which_text import with_text

SNAPSHOT = "calibration-snapshot.safetensors"
PROFILE = "profile.safetensors"
SNAPSHOT_SECONDS = 20.0


def calibrate_model(
    model: str | Path, out: str | Path, options: CalibrateOptions | None = None, **how: Unpack[Writing]
) -> Statistics:
    """Write the statistics of a model to a folder that `refactor(calibration=...)` reads. how: see `Writing`.

    Raises UsageError, DoesNotFit or CorruptError before anything is visible at `out`.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=1024, length=256)
    >>> statistics = moe_prism.calibrate_model("nano", "statistics", few)
    >>> statistics.to_json()["tokens"], len(statistics.to_records())  # 6 layers of 32 experts
    (1024, 192)
    """
    return _calibrate(model, out, options or CalibrateOptions(), how)


def calibrate_part(
    model: str | Path, out: str | Path, shard: str, options: CalibrateOptions | None = None, **how: Unpack[Writing]
) -> Statistics:
    """Run a part of the calibration text only, for `join_calibrations`. shard: "2/4" is the second of four parts.

    All parts, and what joins them, need the same model and options. Nothing is shared while they run.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=8192, length=256)
    >>> for i in (1, 2):
    ...     _ = moe_prism.calibrate_part("nano", f"half{i}", f"{i}/2", few)
    >>> moe_prism.join_calibrations("nano", "both", ["half1", "half2"], few).to_json()["tokens"]
    8192
    """
    options, part = options or CalibrateOptions(), Shard.of(shard)
    if options.tasks:
        raise UsageError("--tasks makes its text as it goes, which parts cannot share", "leave --shard or --tasks out")
    return _calibrate(model, out, options, how, part)


def _calibrate(
    model: str | Path, out: str | Path, options: CalibrateOptions, how: Writing, part: Shard | None = None
) -> Statistics:
    resume = how.get("resume", False)
    options.check()
    where = resolve(model)
    options = with_text(options, where)
    check_apart(where, out)
    weights = Weights(where)
    needed = needed_by_calibration(weights, options)
    check_early(needed, out, resume)  # before the text is read, which takes longer
    asked = plan(load_tokenizer(where), options, _longest(where)) if options.tasks else None
    windows = None if asked else _own(calibration_windows(where, options), options, part)
    check_fit(weights, options)
    source = source_facts(where)
    del weights  # of a GGUF file it holds the whole model
    inputs = {"source": source, "options": recorded(options)}
    done = finished(out, {"kind": "calibration", **inputs}) if resume else None
    if done and done["facts"].get("part") == (part and list(part)):
        return _read(Path(out), done)
    forecast = partial(lasts, where, windows, options, needed) if windows else None
    begin(needed, out, resume=resume, force=how.get("force", False), lasts=forecast)
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        journal = Journal(folder.work, inputs if part is None else {**inputs, "part": list(part)})
        report = how.get("report", silent)
        answers = Answering(asked, options, folder, journal) if asked else None
        if answers:
            windows, facts = demonstrate(where, answers, report)
        assert windows is not None
        on_disk = bool(needed.get(MAPPED))
        statistics = run_pass(where, windows, options, folder, journal, report, kept=False, on_disk=on_disk)
        if answers:
            statistics.facts |= facts
            answers.discard()
        if part is not None:
            statistics.facts |= {"part": list(part), "windows": len(windows.ids)}
        write_statistics(folder, statistics, inputs)
    return statistics


def write_statistics(folder: OutputFolder, statistics: Statistics, inputs: Mapping[str, Any]) -> None:
    """A folder's whole content. inputs: source and options, for its manifest."""
    for i, layer in enumerate(statistics.layers):
        folder.save_tensors(f"layer-{i:03d}.safetensors", layer.flat(), {"name": layer.name})
    folder.save_tensors(PROFILE, {"ids": statistics.profile})
    discard_snapshots(folder)
    write_manifest(folder, {"kind": "calibration", **inputs, "facts": statistics.facts})
    folder.finish()


def _own(windows: Windows, options: CalibrateOptions, part: Shard | None) -> Windows:
    """The text of a part: all of it, of which some windows are run. Parts are runs of whole batches, so that each is computed as in one.

    Of a short text some parts are empty.
    """
    if part is None:
        return windows
    begins = [batch.first for batch in batches(windows.ids, settings(options).size, windows.parts)]
    start, stop = (number * len(begins) // part.count for number in (part.number, part.number + 1))
    ends = [*begins, len(windows.ids)]
    return replace(windows, span=(ends[start], ends[stop]))


def lasts(where: Path, windows: Windows, options: CalibrateOptions, needed: Mapping[str, Any]) -> Seconds | None:
    """How long a pass takes that needs so much."""
    from .disk_time import OnDisk  # a real run wants none of it
    from .job_times import pass_time

    disk = OnDisk.of(Weights(where), needed) if needed.get(MAPPED) else None
    return pass_time(where, windows, options, needed["disk_bytes"] - (disk.experts if disk else 0), disk)


def demonstrate(where: Path, answers: Answering, report: Report) -> tuple[Windows, dict[str, Any]]:
    """Let the model answer, and take both as calibration text; the facts of it."""
    if not answers.is_done():
        answers.run(load_to_run(where), load_tokenizer(where), report)
    return answers.collect(min(answers.options.length, _longest(where)))


def check_fit(weights: Weights, options: CalibrateOptions) -> None:
    """What would stop the pass, found before anything is written: CorruptError, UsageError or DoesNotFit."""
    if options.low_memory and weights.stream is None:
        raise UsageError(f"--low-memory needs a folder of safetensors files, not '{weights.path}'", "leave it out")
    if options.low_memory and settings(options).goes_back:
        raise UsageError(WHOLE, "leave --low-memory out, or choose what reads no gradients")
    bounded_capacity(weights.layers, settings(options))
    weights.check_finite()


def read_statistics(folder: str | Path) -> Statistics:
    """What `calibrate_model` wrote. Raises UsageError for a folder of another kind, CorruptError for a damaged one.

    >>> import moe_prism
    >>> moe_prism.read_statistics("elastic")
    Traceback (most recent call last):
    moe_prism.errors.UsageError: 'elastic' is not a calibration; give the folder written by `moe-prism calibrate`
    """
    return _read(Path(folder), _checked_manifest(folder))


def open_statistics(folder: str | Path) -> Statistics:
    """The same, with layers that stay on disk: each is read when it is asked for."""
    return _read(Path(folder), _checked_manifest(folder), stay=True)


def _checked_manifest(folder: str | Path) -> dict[str, Any]:
    """Of a whole calibration."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "calibration":
        raise UsageError(f"'{folder}' is not a calibration", "give the folder written by `moe-prism calibrate`")
    if manifest["facts"].get("part"):
        number, count = manifest["facts"]["part"]
        raise UsageError(f"'{folder}' is part {number + 1} of {count} of a calibration", "join them with `calibrate --join`")
    return manifest


def _read(folder: Path, manifest: Mapping[str, Any], *, stay: bool = False) -> Statistics:
    """What a folder with this manifest holds; of a part too. stay: each layer is looked at now, and read again when it is asked for."""
    check_listed(folder, manifest, sorted(manifest["files"]))
    names, capacity = manifest["facts"]["layers"], manifest["facts"]["capacity"]

    def layer(i: int) -> LayerStatistics:
        path = Path(folder) / f"layer-{i:03d}.safetensors"
        found = LayerStatistics.unflat(names[i], read_tensors(path))
        found.check(str(path), capacity, {})
        return found

    layers = StoredLayers(layer, len(names)) if stay else [layer(i) for i in range(len(names))]
    path = Path(folder) / PROFILE
    profile = read_tensors(path).get("ids")
    if profile is None or profile.dtype != torch.int64 or profile.ndim != 2 or not profile.numel() or int(profile.min()) < 0:
        raise CorruptError(f"{path}: 'ids' must be token ids [windows, length] (int64)", "calibrate again")
    return Statistics(layers, profile, {**manifest["facts"], "source": manifest["source"], "options": manifest["options"]})


def run_pass(
    where: Path,
    windows: Windows,
    options: CalibrateOptions,
    folder: OutputFolder,
    journal: Journal,
    report: Report,
    *,
    kept: bool = True,
    on_disk: bool = False,
) -> Statistics:
    """The pass with snapshots in the work folder, so that a killed run goes on from the last one.

    kept: one is made at the end too, for work that follows. It is as large as the statistics, which a calibration writes then anyway.
    on_disk: a layer at a time, its experts lie in the work folder.
    """
    if options.low_memory:
        stream = LayerStream(where, torch.float32)
        stream.room = folder.work if on_disk else None
        return _run_layers(stream, windows, options, folder, journal, report)
    with torch.no_grad():
        model = load_to_run(where)
        work = Pass(model, find_layers(model), settings(options))
        if journal.done(SNAPSHOT):
            work.load(_snapshot(folder.work / SNAPSHOT, work, len(windows.ids)))
        last = time.monotonic()
        stop = windows.span[1] if windows.span else len(windows.ids)

        def after_batch() -> None:
            nonlocal last
            if time.monotonic() - last > SNAPSHOT_SECONDS or (kept and work.done == stop):
                journal.finish(SNAPSHOT, folder.save_tensors(SNAPSHOT, work.state()))
                last = time.monotonic()

        with report("calibrate") as update:
            work.run(windows.ids, update, after_batch, windows.parts, windows.span)
        return work.statistics(pass_facts(work, windows))


def pass_facts(work: Pass, windows: Windows) -> dict[str, Any]:
    """What the facts of a pass say of its text and layers."""
    return {
        "layers": [layer.name for layer in work.layers],
        "tokens": windows.tokens,
        "length": windows.ids.shape[1],
        "documents": list(windows.documents),
        **windows.facts(),
    }


def _run_layers(
    stream: LayerStream, windows: Windows, options: CalibrateOptions, folder: OutputFolder, journal: Journal, report: Report
) -> Statistics:
    """A decoder layer at a time; what a layer gave is a unit of the journal."""
    work = LayerwisePass(stream, find_layers(stream.model), settings(options), together=True)
    found: dict[int, LayerStatistics] = {}

    def finish(i: int) -> None:
        name = layer_snapshot(i)
        if journal.done(name):
            found[i] = LayerStatistics.unflat(work.layers[i].name, read_tensors(folder.work / name))
            _check_snapshot(str(folder.work / name), found[i], work, work.layers[i])
        else:
            found[i] = work.gathered(i)
            journal.finish(name, folder.save_tensors(name, found[i].flat()))

    known = [journal.done(layer_snapshot(i)) for i in range(len(work.layers))]
    with report("calibrate") as update:
        work.run_layers(windows.ids, finish, parts=windows.parts, span=windows.span, known=known.__getitem__, progress=update)
    facts = {"capacity": work.capacity, "windows": work.done, **pass_facts(work, windows)}
    return Statistics([found[i] for i in range(len(work.layers))], work.profile, facts)


def layer_snapshot(layer: int) -> str:
    """Of a pass that takes one layer at a time."""
    return f"calibration-{layer:03d}.safetensors"


def discard_snapshots(folder: OutputFolder) -> None:
    """Take what a pass left for its continuation out of the work folder."""
    for path in sorted(folder.work.glob("calibration-*.safetensors")):
        folder.discard(path.name)


def _snapshot(path: Path, work: Pass, windows: int) -> dict[str, Tensor]:
    """What an interrupted pass had gathered. CorruptError for what this pass could not have written."""
    state = read_tensors(path)
    done, again = state.get("done"), "use --force to start again"
    if done is None or done.dtype != torch.int64 or done.shape != (1,) or not 0 <= int(done) <= windows:
        raise CorruptError(f"{path}: 'done' must be a number of windows up to {windows}", again)
    known = {"done"}
    for i, layer in enumerate(work.layers):
        own = {key.partition("/")[2]: tensor for key, tensor in state.items() if key.startswith(f"{i}/")}
        known |= {f"{i}/{key}" for key in own}
        _check_snapshot(str(path), LayerStatistics.unflat(layer.name, own), work, layer)
    if set(state) - known:
        raise CorruptError(f"{path}: '{one_line(min(set(state) - known))}' is not known", again)
    return state


def _check_snapshot(path: str, found: LayerStatistics, work: Pass, layer: MoELayer) -> None:
    """CorruptError for statistics of a layer that this pass could not have gathered."""
    found.check(path, work.capacity, {"E": layer.num_experts, "d": layer.hidden})
    gathered = {*found.values, *(f"{d}/{n}" for d, values in found.domains.items() for n in values)}
    expected = set(work.settings.gathered())
    if gathered not in (expected, expected | set(work.settings.collectors)):
        raise CorruptError(
            f"{path}: layer {layer.index} holds other statistics than this pass gathers", "use --force to start again"
        )


def check_fits(given: Statistics, weights: Weights) -> None:
    """UsageError for a calibration that is of another model."""
    given.check_fits(weights.layers)
    vocabulary = weights.model.get_input_embeddings().weight.shape[0]
    if int(given.profile.max()) >= vocabulary:
        raise UsageError(f"the calibration has token ids beyond the model's {vocabulary}", "calibrate this model")


def calibration_windows(where: Path, options: CalibrateOptions) -> Windows:
    """The calibration side of the options' text, in windows no longer than the model's context."""
    tokenizer = load_tokenizer(where)
    length = min(options.length, _longest(where))
    return token_windows(tokenizer, options.source, "calibration", length=length, tokens=options.tokens)


def _longest(where: Path) -> int:
    """The model's context limit, where its configuration names one."""
    if where.is_file():
        return 1 << 30
    config = read_config(where)
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

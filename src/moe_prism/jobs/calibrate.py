"""Calibrate a checkpoint: one pass, resumable, in memory or one decoder layer at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import load_file

from ..artefact.load import read_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import Pass, bounded_capacity
from ..calibrate.statistics import LayerStatistics, Statistics
from ..checkpoint import Journal, LayerStream, OutputFolder, read_manifest, source_facts, write_manifest
from ..data import Windows, token_windows
from ..errors import UsageError
from ..model import find_layers, load_to_run, load_tokenizer, resolve
from ..options.calibrate import CalibrateOptions
from ..progress import Report, silent

SNAPSHOT = "calibration-snapshot.safetensors"
PROFILE = "profile.safetensors"
SNAPSHOT_SECONDS = 20.0
STARVED = 256  # tokens; fewer say too little about an expert's neurons (spec section 3)


def calibrate_model(
    model: str | Path, out: str | Path, options: CalibrateOptions | None = None, **how: Unpack[Writing]
) -> Statistics:
    """Write the statistics of a model to a folder that `refactor(calibration=...)` reads. how: see `Writing`.

    Raises UsageError, DoesNotFit or CorruptError before anything is visible at `out`.
    """
    options, resume = options or CalibrateOptions(), how.get("resume", False)
    options.check()
    where = resolve(model)
    check_apart(where, out)
    weights = Weights(where)
    windows = calibration_windows(where, options)
    check_fit(weights, options)
    source = source_facts(where)
    del weights  # of a GGUF file it holds the whole model
    inputs = {"source": source, "options": asdict(options)}
    if resume and finished(out, {"kind": "calibration", **inputs}):
        return read_statistics(out)
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        journal = Journal(folder.work, inputs)
        statistics = run_pass(where, windows, options, folder, journal, how.get("report", silent))
        for i, layer in enumerate(statistics.layers):
            folder.save_tensors(f"layer-{i:03d}.safetensors", layer.flat(), {"name": layer.name})
        folder.save_tensors(PROFILE, {"ids": statistics.profile})
        folder.discard(SNAPSHOT)
        write_manifest(folder, {"kind": "calibration", **inputs, "facts": statistics.facts})
        folder.finish()
    return statistics


def check_fit(weights: Weights, options: CalibrateOptions) -> None:
    """What would stop the pass, found before anything is written: CorruptError, UsageError or DoesNotFit."""
    if options.low_memory and weights.stream is None:
        raise UsageError(f"--low-memory needs a folder of safetensors files, not '{weights.path}'", "leave it out")
    bounded_capacity(weights.layers, settings(options))
    weights.check_finite()


def read_statistics(folder: str | Path) -> Statistics:
    """What `calibrate` wrote. Raises UsageError for a folder of another kind, CorruptError for a damaged one."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "calibration":
        raise UsageError(f"'{folder}' is not a calibration", "give the folder written by `moe-prism calibrate`")
    layers = []
    for i, name in enumerate(manifest["facts"]["layers"]):
        layers.append(LayerStatistics.unflat(name, read_tensors(Path(folder) / f"layer-{i:03d}.safetensors")))
    profile = read_tensors(Path(folder) / PROFILE)["ids"]
    return Statistics(layers, profile, {**manifest["facts"], "source": manifest["source"], "options": manifest["options"]})


def run_pass(
    where: Path | str, windows: Windows, options: CalibrateOptions, folder: OutputFolder, journal: Journal, report: Report
) -> Statistics:
    """The pass with snapshots in the work folder, so that a killed run goes on from the last one."""
    with _model(where, options) as model:
        layers = find_layers(model)
        work = Pass(model, layers, settings(options))
        if journal.done(SNAPSHOT):
            work.load(load_file(str(folder.work / SNAPSHOT)))
        last = time.monotonic()

        def after_batch() -> None:
            nonlocal last
            if time.monotonic() - last > SNAPSHOT_SECONDS or work.done == len(windows.ids):
                journal.finish(SNAPSHOT, folder.save_tensors(SNAPSHOT, work.state()))
                last = time.monotonic()

        with report("calibrate") as update:
            work.run(windows.ids, update, after_batch)
        facts = {
            "layers": [layer.name for layer in layers],
            "text": windows.source,
            "tokens": windows.tokens,
            "length": windows.ids.shape[1],
            "documents": list(windows.documents),
        }
        return work.statistics(facts)


@contextmanager
def _model(where: Path | str, options: CalibrateOptions) -> Iterator[Any]:
    """The model to calibrate, whole or layer by layer; that is done on the CPU."""
    with torch.no_grad():
        if not options.low_memory:
            yield load_to_run(where)
            return
        with LayerStream(where, torch.float32).streaming() as model:
            yield model


def calibration_windows(where: Path | str, options: CalibrateOptions) -> Windows:
    """The calibration side of the options' text, in windows no longer than the model's context."""
    tokenizer = load_tokenizer(where)
    length = min(options.length, _longest(where))
    return token_windows(tokenizer, options.text, "calibration", length=length, tokens=options.tokens)


def _longest(where: Path | str) -> int:
    """The model's context limit, where its configuration names one."""
    if isinstance(where, Path) and where.is_file():
        return 1 << 30
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(where), trust_remote_code=False)
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

"""Turn a checkpoint into an elastic one: calibrate, partition every expert, fit the predictors, write the weights in block order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.statistics import LayerStatistics, Statistics
from ..checkpoint import Journal, OutputFolder, source_facts, write_manifest
from ..data import Windows
from ..elastic.rules.threshold import kept_shares, pool_cutoffs
from ..elastic.side_tensors import CUTOFFS, LAYER_BUDGETS, SHARES
from ..errors import UsageError
from ..forecast.work_time import Seconds
from ..model import MoELayer, resolve
from ..model.place import recorded
from ..options.refactor import RefactorOptions
from ..options.text import source_in
from ..progress import Report, Update, peak_rss_bytes, silent
from ..result import Result, plain
from .align import align
from .calibrate import calibration_windows, check_fit, check_fits, open_statistics, run_pass
from .distance import TOKENS, distance_between, evaluation_windows
from .expert_memory import MAPPED
from .needed_by_refactor import needed_by, needed_by_shard
from .profile_layers import Profiler, budget_tensors, profile_runs, spaced, unit_cost
from .refactor_files import CUTOFFS_FILE, write_side_files
from .refactor_layers import Units, solve_layers
from .refactor_units import Shard, Solved, counts, join, profile_name, profile_run, read_unit, unit_facts, unit_name
from .rehearsal import begin, check_early
from .resources import check_width
from .solve_layer import PERM, solve
from .which_text import with_text


@dataclass(frozen=True)
class Refactored(Result):
    """What was done: the folder, its manifest, the partition costs, and the peak memory of this process."""

    folder: Path
    manifest: dict[str, Any]
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Facts of the run as plain JSON values."""
        layers = self.manifest["layers"]
        return {
            "folder": str(self.folder),
            "n_sub": self.manifest["n_sub"],
            "layers": len(layers),
            "partition_cost_share": sum(layer["cost_share"] for layer in layers) / len(layers),
            "starved_experts": sum(len(layer["starved"]) for layer in layers),
            "left_out": self.manifest["companions"]["left_out"],
            "kept_format": self.manifest.get("kept_format"),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A row per layer."""
        return [{"layer": i, **row} for i, row in enumerate(plain(self.manifest["layers"]))]


def refactor(
    model: str | Path,
    out: str | Path,
    options: RefactorOptions | None = None,
    *,
    calibration: str | Path | None = None,
    shards: Sequence[str | Path] = (),
    **how: Unpack[Writing],
) -> Refactored:
    """Write an elastic copy of a checkpoint to `out`: same files, names and shapes, plus prism.json and prism.safetensors.

    calibration: a folder written by `calibrate`; without it the pass runs here. shards: of `refactor_shard`, whose layers are taken
    instead of solved. how: see `Writing`.
    Raises UsageError or CorruptError before anything is written if the model, text or options cannot work.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=1024, length=256)
    >>> done = moe_prism.refactor("nano", "cut", moe_prism.RefactorOptions(calibration=few, profile_tokens=0))
    >>> done.to_json()["n_sub"], len(done.to_records())
    (4, 6)
    """
    job = _Job(_Asked(model, out, calibration), options, how)
    weights, given, options, windows = job.weights, job.given, job.options, job.windows
    if job.resume and (done := finished(out, job.wanted())):
        return Refactored(Path(out), done, peak_rss_bytes())
    job.begin()
    with OutputFolder(out, resume=job.resume, force=job.force) as folder:
        job.make_room(folder)
        work = _Work(folder, Journal(folder.work, job.fingerprint()), how.get("report", silent))
        join(shards, folder, work.journal)
        if weights.stream and options.calibration.low_memory:
            given = _by_layers(work, weights, windows or given, options, job.together)
        elif windows is not None:
            given = run_pass(weights.path, windows, options.calibration, folder, work.journal, work.report)
        assert given is not None
        rows = _solve_layers(work, job, given, weights.layers)
        _pool_cutoffs(work, weights, given, options, rows)
        with work.report("write") as update:
            units = partial(read_unit, folder)
            kept = weights.rewrite(
                folder, work.journal, lambda layer: units(layer)[PERM], update, lambda layer: counts(units(layer))
            )
        facts = _facts(weights, job.source, options, rows, given)
        if job.aligned:
            facts["align"] = job.aligned
        if kept:
            facts["kept_format"] = kept | _distance(weights, folder, given, options)
        write_side_files(folder, weights, facts)
        manifest = write_manifest(folder, facts)
        folder.finish()
    return Refactored(Path(out), manifest, peak_rss_bytes())


def refactor_shard(
    model: str | Path,
    out: str | Path,
    shard: str,
    options: RefactorOptions | None = None,
    *,
    calibration: str | Path,
    **how: Unpack[Writing],
) -> Solved:
    """Solve some layers only, for `refactor(shards=...)`, which writes the checkpoint. shard: "2/4" is the second of four parts.

    All parts, and what joins them, need the same model, options and calibration. Nothing is shared while they run.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=1024, length=256, collectors=["counts", "tokens"])
    >>> _ = moe_prism.calibrate_model("nano", "statistics", few)
    >>> asked = moe_prism.RefactorOptions(calibration=few, profile_tokens=0)
    >>> moe_prism.refactor_shard("nano", "first", "1/2", asked, calibration="statistics").layers
    [0, 2, 4]
    """
    part = Shard.of(shard)
    job = _Job(_Asked(model, out, calibration, part), options, how)
    assert job.given is not None
    layers = job.solved
    job.begin()
    with OutputFolder(out, resume=job.resume, force=job.force) as folder:
        job.make_room(folder)
        work = _Work(folder, Journal(folder.work, job.fingerprint()), how.get("report", silent))
        _solve_layers(work, job, job.given, layers)
    return Solved(folder.work, [layer.index for layer in layers])


class _Asked(NamedTuple):
    """Whose refactoring, where to, with which statistics, and which part of it."""

    model: str | Path
    out: str | Path
    calibration: str | Path | None
    part: Shard | None = None


class _Job:
    """What is looked at before anything is written. UsageError or CorruptError for what cannot work."""

    def __init__(self, asked: _Asked, options: RefactorOptions | None, how: Writing) -> None:
        model, out, calibration, part = asked
        options, self.out = options or RefactorOptions(), out
        self.resume, self.force = how.get("resume", False), how.get("force", False)
        options.check()
        where = resolve(model)
        options = replace(options, calibration=with_text(options.calibration, where))
        check_apart(where, out)
        self.given = given = open_statistics(calibration) if calibration else None
        self.weights = weights = Weights(where, options.dtype, options.keep)
        self.options, self.together, self.aligned = align(weights, options)
        for layer in weights.layers:
            check_width(layer, self.options)
        self.is_part = part is not None
        self.solved = part.of_layers(weights.layers) if part else weights.layers
        if given and part:
            self.needed = needed_by_shard(weights, self.options, given, len(self.solved))
        else:
            self.needed = needed_by(weights, self.options, given)
        check_early(self.needed, out, self.resume)  # before the text is read, which takes longer
        weights.check_rewritable()
        self.windows = None if given else calibration_windows(where, self.options.calibration)
        if self.windows:
            check_fit(weights, self.options.calibration)
        else:
            weights.check_finite()
        self.source = source_facts(where)
        if given:
            self._check(given, calibration)

    def make_room(self, folder: OutputFolder) -> None:
        """Have a layer's experts lie in this folder while it is worked on, where they do not fit in memory."""
        if self.weights.stream and self.needed.get(MAPPED):
            self.weights.stream.room = folder.work

    def _check(self, given: Statistics, calibration: str | Path | None) -> None:
        """That statistics are of this model, and enough."""
        if given.facts["source"] != self.source:
            raise UsageError(
                f"'{calibration}' was calibrated on another checkpoint", "calibrate this one, or leave --calibration out"
            )
        check_fits(given, self.weights)
        if not {"counts", "tokens"} <= set(given.outlines[0].values):
            raise UsageError(f"'{calibration}' holds no sample of tokens", "calibrate with --collectors counts,tokens")

    def _inputs(self) -> dict[str, Any]:
        return {"source": self.source, "options": recorded(self.options)}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the result."""
        return {**self._inputs(), "calibration": self.given.facts if self.given else None}

    def wanted(self) -> dict[str, Any]:
        """What the manifest of a finished run like this one has."""
        return {"kind": "elastic", **self._inputs(), **({"calibration": _summary(self.given)} if self.given else {})}

    def begin(self) -> None:
        """Whether it fits, told before it is tried."""
        begin(self.needed, self.out, resume=self.resume, force=self.force, lasts=self._lasts)

    def _lasts(self) -> Seconds | None:
        """How long it takes."""
        from .disk_time import OnDisk  # a real run wants none of it
        from .job_times import refactor_time, shard_time

        text, disk = self.windows or self.given, OnDisk.of(self.weights, self.needed)
        if self.is_part and isinstance(text, Statistics):
            return shard_time(self.weights, text, self.options, self.together, len(self.solved), disk)
        return None if text is None else refactor_time(self.weights, text, self.options, self.together, disk)


class _Work(NamedTuple):
    """The folder that is being written, what of it is finished, and who hears of it."""

    folder: OutputFolder
    journal: Journal
    report: Report


def _distance(weights: Weights, folder: OutputFolder, statistics: Statistics, options: RefactorOptions) -> dict[str, Any]:
    """KL of the written checkpoint against the source, on held-out windows, else on those of the calibration."""
    length = statistics.profile.shape[1]
    windows = evaluation_windows(weights.path, source_in(statistics.facts), length)
    ids = windows.ids if windows else statistics.profile[: max(1, TOKENS // length)]
    quality = distance_between(weights.path, folder.work, ids)
    return {"kl": round(quality.kl, 8), "kl_tokens": quality.tokens, "kl_text": "evaluation" if windows else "calibration"}


def _by_layers(
    work: _Work, weights: Weights, text: Windows | Statistics | None, options: RefactorOptions, together: int
) -> Statistics:
    """Calibrate, solve and profile one decoder layer after the other; what `_solve_layers` and `_profile` look for is then there."""
    folder, journal, report = work
    assert text is not None

    def solve_one(layer: MoELayer, statistics: LayerStatistics) -> None:
        _solve_layer(work, layer, statistics, options, together)

    units = Units(lambda layer: journal.done(unit_name(layer)), partial(read_unit, folder), solve_one)
    statistics, found = solve_layers(weights, text, options, units, report)
    for i, run in enumerate(found):
        journal.finish(profile_name(i), folder.save_tensors(profile_name(i), run))
    return statistics


def _solve_layer(work: _Work, layer: MoELayer, statistics: LayerStatistics, options: RefactorOptions, together: int) -> None:
    """A layer whose weights are in memory: its tensors, with its facts in the file's metadata."""
    tensors, facts = solve(layer, statistics, options, together)
    digest = work.folder.save_tensors(unit_name(layer), tensors, {"facts": json.dumps(facts)})
    work.journal.finish(unit_name(layer), digest)


def _solve_layers(work: _Work, job: _Job, statistics: Statistics, layers: Sequence[MoELayer]) -> list[dict[str, Any]]:
    """One journal unit per layer: its tensors, with its facts in the file's metadata. Returns the facts."""
    folder, journal, report = work
    rows = []
    with report("partition") as update:
        for number, layer in enumerate(layers, 1):
            if not journal.done(unit_name(layer)):
                with job.weights.loaded(layer):
                    _solve_layer(work, layer, statistics.layers[layer.index], job.options, job.together)
            rows.append(unit_facts(folder, layer))
            update(number, len(layers))
    return rows


def _pool_cutoffs(
    work: _Work, weights: Weights, statistics: Statistics, options: RefactorOptions, rows: list[dict[str, Any]]
) -> None:
    """Cutoffs and layer budgets that spend a budget where it matters most."""
    if not options.profile_tokens:
        return
    folder, journal, _ = work
    runs = profile_runs(options.profile_points)
    units = [read_unit(folder, layer) for layer in weights.layers]
    ids = spaced(statistics.profile, options.profile_tokens)
    found = _profile(work, lambda: Profiler(weights.path, units, options.n_sub, options.gates), runs, ids)
    own = [unit[CUTOFFS] for unit in units]
    profiles = [[(budget, float(run["kl"][i])) for (_, budget), run in zip(runs, found, strict=True)] for i in range(len(units))]
    costs = [unit_cost(level, *profile[0]) for level, profile in zip(own, profiles, strict=True)]
    if not journal.done(CUTOFFS_FILE):
        pooled = pool_cutoffs(own, costs)
        tensors = {f"layers.{i}.{CUTOFFS}": level for i, level in enumerate(pooled)}
        tensors |= {f"layers.{i}.{SHARES}": kept_shares(*each) for i, each in enumerate(zip(own, pooled, strict=True))}
        plans = budget_tensors(own, [profile[1:] or profile for profile in profiles], int(found[0]["slots"]))
        digest = folder.save_tensors(
            CUTOFFS_FILE, tensors | {f"layers.{i}.{LAYER_BUDGETS}": plan for i, plan in enumerate(plans)}
        )
        journal.finish(CUTOFFS_FILE, digest)
    for row, cost, profile in zip(rows, costs, profiles, strict=True):
        row["sensitivity"] = cost
        row["profile"] = [
            {"rule": rule, "budget": budget, "kl": kl} for (rule, _), (budget, kl) in zip(runs, profile, strict=True)
        ]


def _profile(
    work: _Work, make: Callable[[], Profiler], runs: Sequence[tuple[str, float]], ids: Tensor
) -> list[dict[str, Tensor]]:
    """{kl [L], slots} per run, each a journal unit: an interruption loses at most the run in flight."""
    folder, journal, report = work
    names = [profile_name(i) for i in range(len(runs))]
    todo = [(name, *run) for name, run in zip(names, runs, strict=True) if not journal.done(name)]
    if todo:
        with report("sensitivity") as update:
            profiler = make()
            for i, (name, rule, budget) in enumerate(todo):
                kl, slots = profiler.alone(rule, budget, ids, _part(update, i, len(todo)))
                journal.finish(name, folder.save_tensors(name, {"kl": kl, "slots": torch.tensor(slots)}))
    return [profile_run(folder.work / name) for name in names]


def _part(update: Update, i: int, parts: int) -> Update:
    """Progress of the i-th of several equal parts as progress of the whole."""
    return lambda done, total: update(i * total + done, parts * total)


def _facts(
    weights: Weights,
    source: Mapping[str, Any],
    options: RefactorOptions,
    rows: Sequence[Mapping[str, Any]],
    statistics: Statistics,
) -> dict[str, Any]:
    """prism.json: nothing in it depends on time, machine or interruptions."""
    return {
        "kind": "elastic",
        "source": source,
        "companions": weights.companions,
        "n_sub": options.n_sub,
        "gates": options.gates,
        "bytes_per_weight": weights.bytes_per_weight,
        **({"dequantized": weights.dequantized} if weights.dequantized else {}),
        "layers": list(rows),
        "options": recorded(options),
        "calibration": _summary(statistics),
    }


def _summary(statistics: Statistics) -> dict[str, Any]:
    wanted = ("text", "text_source", "domains", "read", "tokens", "documents", "capacity")
    return {key: statistics.facts[key] for key in wanted if key in statistics.facts}

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

from ..artefact.keep_format import discard_sums
from ..artefact.load import SIDE_FILE, read_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.statistics import LayerStatistics, Statistics
from ..checkpoint import Journal, OutputFolder, check_finite, read_header, source_facts, write_manifest
from ..checkpoint.formats.requantize import TOGETHER, Counts
from ..data import Windows
from ..elastic.rules.threshold import kept_shares, pool_cutoffs
from ..elastic.side_tensors import CUTOFFS, LAYER_BUDGETS, SHARES, check_values
from ..errors import CorruptError, UsageError
from ..model import MoELayer, resolve
from ..model.place import recorded
from ..options.refactor import RefactorOptions
from ..options.text import source_in
from ..progress import Report, Update, peak_rss_bytes, silent
from ..result import Result, plain
from ..schema import check, decode
from ..schema.manifest import LayerForm
from .align import align
from .calibrate import calibration_windows, check_fit, check_fits, discard_snapshots, read_statistics, run_pass
from .distance import TOKENS, distance_between, evaluation_windows
from .profile_layers import Profiler, budget_tensors, profile_runs, spaced, unit_cost
from .refactor_card import model_card
from .refactor_layers import Units, solve_layers
from .rehearsal import begin, check_early
from .resources import check_width, needed_by
from .solve_layer import IMPORTANCE, PERM, PRODUCTS, WORKING, solve
from .which_text import with_text

CUTOFFS_FILE = "cutoffs.safetensors"
AGAIN = "use --force to start again"


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
    **how: Unpack[Writing],
) -> Refactored:
    """Write an elastic copy of a checkpoint to `out`: same files, names and shapes, plus prism.json and prism.safetensors.

    calibration: a folder written by `calibrate`; without it the pass runs here. how: see `Writing`.
    Raises UsageError or CorruptError before anything is written if the model, text or options cannot work.

    >>> import moe_prism
    >>> few = moe_prism.CalibrateOptions(tokens=1024, length=256)
    >>> done = moe_prism.refactor("nano", "cut", moe_prism.RefactorOptions(calibration=few, profile_tokens=0))
    >>> done.to_json()["n_sub"], len(done.to_records())
    (4, 6)
    """
    options, resume = options or RefactorOptions(), how.get("resume", False)
    options.check()
    where = resolve(model)
    options = replace(options, calibration=with_text(options.calibration, where))
    check_apart(where, out)
    given = read_statistics(calibration) if calibration else None
    weights = Weights(where, options.dtype, options.keep)
    options, together, aligned = align(weights, options)
    for layer in weights.layers:
        check_width(layer, options)
    needed = needed_by(weights, options, given)
    check_early(needed, out, resume)  # before the text is read, which takes longer
    weights.check_rewritable()
    windows = None if given else calibration_windows(where, options.calibration)
    if windows:
        check_fit(weights, options.calibration)
    else:
        weights.check_finite()
    source = source_facts(where)
    if given and given.facts["source"] != source:
        raise UsageError(
            f"'{calibration}' was calibrated on another checkpoint", "calibrate this one, or leave --calibration out"
        )
    if given:
        check_fits(given, weights)
    if given and not {"counts", "tokens"} <= set(given.layers[0].values):
        raise UsageError(f"'{calibration}' holds no sample of tokens", "calibrate with --collectors counts,tokens")
    inputs = {"source": source, "options": recorded(options)}
    fingerprint = {**inputs, "calibration": given.facts if given else None}
    if resume and (done := finished(out, {"kind": "elastic", **inputs, **({"calibration": _summary(given)} if given else {})})):
        return Refactored(Path(out), done, peak_rss_bytes())
    begin(needed, out, resume=resume, force=how.get("force", False))
    with OutputFolder(out, resume=resume, force=how.get("force", False)) as folder:
        work = _Work(folder, Journal(folder.work, fingerprint), how.get("report", silent))
        if weights.stream and options.calibration.low_memory:
            given = _by_layers(work, weights, windows or given, options, together)
        elif windows is not None:
            given = run_pass(where, windows, options.calibration, folder, work.journal, work.report)
        assert given is not None
        rows = _solve_layers(work, weights, given, options, together)
        _pool_cutoffs(work, weights, given, options, rows)
        with work.report("write") as update:
            units = partial(_unit, folder)
            kept = weights.rewrite(
                folder, work.journal, lambda layer: units(layer)[PERM], update, lambda layer: _counts(units(layer))
            )
        facts = _facts(weights, source, options, rows, given)
        if aligned:
            facts["align"] = aligned
        if kept:
            facts["kept_format"] = kept | _distance(weights, folder, given, options)
        _write_side_files(folder, weights, facts)
        manifest = write_manifest(folder, facts)
        folder.finish()
    return Refactored(Path(out), manifest, peak_rss_bytes())


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

    units = Units(lambda layer: journal.done(_unit_name(layer)), partial(_unit, folder), solve_one)
    statistics, found = solve_layers(weights, text, options, units, report)
    for i, run in enumerate(found):
        journal.finish(_profile_name(i), folder.save_tensors(_profile_name(i), run))
    return statistics


def _solve_layer(work: _Work, layer: MoELayer, statistics: LayerStatistics, options: RefactorOptions, together: int) -> None:
    """A layer whose weights are in memory: its tensors, with its facts in the file's metadata."""
    tensors, facts = solve(layer, statistics, options, together)
    digest = work.folder.save_tensors(_unit_name(layer), tensors, {"facts": json.dumps(facts)})
    work.journal.finish(_unit_name(layer), digest)


def _solve_layers(
    work: _Work, weights: Weights, statistics: Statistics, options: RefactorOptions, together: int
) -> list[dict[str, Any]]:
    """One journal unit per layer: its tensors, with its facts in the file's metadata. Returns the facts.

    together: neighbouring neurons that move as one.
    """
    folder, journal, report = work
    rows = []
    with report("partition") as update:
        for layer, mine in zip(weights.layers, statistics.layers, strict=True):
            if not journal.done(_unit_name(layer)):
                with weights.loaded(layer):
                    _solve_layer(work, layer, mine, options, together)
            rows.append(_unit_facts(folder, layer))
            update(layer.index + 1, len(weights.layers))
    return rows


def _pool_cutoffs(
    work: _Work, weights: Weights, statistics: Statistics, options: RefactorOptions, rows: list[dict[str, Any]]
) -> None:
    """Cutoffs and layer budgets that spend a budget where it matters most."""
    if not options.profile_tokens:
        return
    folder, journal, _ = work
    runs = profile_runs(options.profile_points)
    units = [_unit(folder, layer) for layer in weights.layers]
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
    names = [_profile_name(i) for i in range(len(runs))]
    todo = [(name, *run) for name, run in zip(names, runs, strict=True) if not journal.done(name)]
    if todo:
        with report("sensitivity") as update:
            profiler = make()
            for i, (name, rule, budget) in enumerate(todo):
                kl, slots = profiler.alone(rule, budget, ids, _part(update, i, len(todo)))
                journal.finish(name, folder.save_tensors(name, {"kl": kl, "slots": torch.tensor(slots)}))
    return [_run(folder.work / name) for name in names]


def _run(path: Path) -> dict[str, Tensor]:
    found = read_tensors(path)
    if {name: t.ndim for name, t in found.items()} != {"kl": 1, "slots": 0} or found["slots"].dtype != torch.int64:
        raise CorruptError(f"{path} is no profile of layers", AGAIN)
    check_finite("kl", found["kl"], path.name)
    return found


def _part(update: Update, i: int, parts: int) -> Update:
    """Progress of the i-th of several equal parts as progress of the whole."""
    return lambda done, total: update(i * total + done, parts * total)


def _profile_name(point: int) -> str:
    return f"profile-{point:02d}.safetensors"


def _unit_name(layer: MoELayer) -> str:
    return f"unit-{layer.index:03d}.safetensors"


def _unit(folder: OutputFolder, layer: MoELayer) -> dict[str, Tensor]:
    path = folder.work / _unit_name(layer)
    tensors, shape = read_tensors(path), (layer.num_experts, layer.width)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {PERM: (torch.int32, shape), IMPORTANCE: (torch.float32, shape)}
    if PRODUCTS in tensors:
        wanted[PRODUCTS] = (torch.float32, (layer.num_experts, -(-layer.width // TOGETHER), TOGETHER, TOGETHER))
        check_finite(PRODUCTS, tensors[PRODUCTS], path.name)
    for name, form in wanted.items():
        if name not in tensors or (tensors[name].dtype, tuple(tensors[name].shape)) != form:
            raise CorruptError(f"{path}: '{name}' must be {list(form[1])} for '{layer.name}'", AGAIN)
    check_values(str(path), {name: tensor for name, tensor in tensors.items() if name not in WORKING})
    return tensors


def _counts(unit: Mapping[str, Tensor]) -> Counts:
    return Counts(unit[IMPORTANCE], unit.get(PRODUCTS))


def _unit_facts(folder: OutputFolder, layer: MoELayer) -> dict[str, Any]:
    path = folder.work / _unit_name(layer)
    text = read_header(path).metadata.get("facts", "")
    facts = check(LayerForm, decode(text.encode(), str(path), AGAIN), str(path), AGAIN)
    return facts.model_dump(exclude_unset=True)


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


def _write_side_files(folder: OutputFolder, weights: Weights, facts: Mapping[str, Any]) -> None:
    """prism.safetensors and the model card; work files leave, so that what is renamed is only the result."""
    side = {
        f"layers.{layer.index}.{name}": tensor
        for layer in weights.layers
        for name, tensor in _unit(folder, layer).items()
        if name not in WORKING
    }
    if (folder.work / CUTOFFS_FILE).exists():
        side |= read_tensors(folder.work / CUTOFFS_FILE)
    folder.save_tensors(SIDE_FILE, side, {"format": "pt"})
    folder.write_bytes("README.md", model_card(facts, weights.model.config.model_type).encode())
    # vLLM loads every *.safetensors of a folder that has no index: name the weights, so that the side file is not taken for them
    index, single = folder.work / "model.safetensors.index.json", folder.work / "model.safetensors"
    if single.exists() and not index.exists():
        folder.write_bytes(index.name, single_index(single))
    for layer in weights.layers:
        folder.discard(_unit_name(layer))
    discard_snapshots(folder)
    discard_sums(folder)
    folder.discard(CUTOFFS_FILE)
    for i in range(1 + facts["options"]["profile_points"]):
        folder.discard(_profile_name(i))


def single_index(single: Path) -> bytes:
    """An index that names one file of weights, for tools that would else take every safetensors file of a folder for weights."""
    names = sorted(info.name for info in read_header(single).tensors)
    return json.dumps(
        {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(names, single.name)}, indent=1
    ).encode()

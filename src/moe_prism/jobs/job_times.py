"""How long jobs take on this machine, from batches of them that are run on one decoder layer (`pilot.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..artefact.load import side_tensors
from ..artefact.source import Weights
from ..artefact.streamed import StreamedElastic
from ..calibrate.options import settings
from ..calibrate.run import Pass, batches, bounded_capacity, declared_bytes
from ..calibrate.statistics import STARVED, LayerStatistics, Statistics
from ..data import Windows
from ..elastic import Elastic, LayerParts, attach
from ..elastic.runtime import experts_per_token
from ..forecast.work_time import Seconds, Split, remembered, timed
from ..frontier.measure import BATCH, LOGIT_ROWS, measure
from ..methods.base import Method, Subject
from ..methods.quantize.uniform_bits import standing_rows
from ..methods.skip.base import skip_method
from ..model import MoELayer, find_layers
from ..options.calibrate import CalibrateOptions
from ..options.frontier import FrontierOptions
from ..options.recover import RecoverOptions
from ..options.refactor import RefactorOptions
from ..point import NamedPoint, OperatingPoint
from ..recover.repair import Normal
from ..recover.run import BATCH as REPAIRED
from ..recover.run import equations, groups
from .disk_time import OnDisk
from .pilot import Pilot, few_experts, for_all, spread, typical, written
from .profile_layers import alone_points, profile_runs
from .resources import FLOAT32, largest_layer, written_bytes
from .solve_layer import WORKING, solve

FEW = 4  # experts that are solved to see how long one takes
TRIED = 5  # points of a frontier that are run
SOLVED = 2  # times that all experts of a layer are gone through while it is solved: for their activations, and for the predictor
WARMING = 64  # rows of an expert that is solved before


def pass_time(
    where: Path, windows: Windows, options: CalibrateOptions, written_: int, disk: OnDisk | None = None
) -> Seconds | None:
    """Of a calibration pass over these windows, and of writing so many bytes. None where no layer can be run by itself.

    disk: there lie the experts of a layer.
    """
    if where.is_file():
        return None
    pilot = Pilot(where, disk is not None)
    ids, run = windows.ids, settings(options)
    name = pilot.name("pass", run.collectors, run.capacity, min(run.batch, len(ids)), ids.shape[1], len(run.domains))
    known = remembered(name, lambda: _pass_pieces(pilot, ids, options)[0])
    total = _pass_total(known, pilot.layers, ids, windows.parts, run.batch) + written(written_)
    return total + disk.seconds(pilot, pilot.layers, _batches(ids, run.batch, windows.parts)) if disk else total


def rewriting_time(where: Path, calibrated: tuple[Windows, CalibrateOptions] | None, written_: int, reads: int) -> Seconds | None:
    """Of a pass over text if there is one, of reading all weights so many times layer by layer, and of writing so many bytes."""
    if not where.is_dir():
        return None
    total = written(written_)
    if calibrated is not None:
        passed = pass_time(where, *calibrated, written_)
        if passed is None:
            return None
        total = passed
    pilot = Pilot(where)
    return total + remembered(pilot.name("read"), lambda: {"read": pilot.load()})["read"] * reads


def encoding_time(where: Path, encode: Callable[[MoELayer, int], object], written_: int) -> Seconds:
    """Of packing every expert, from that of a few; encode: does it for an expert of a layer."""
    pilot = Pilot(where)
    layers = find_layers(pilot.model)
    with pilot.there():
        encode(pilot.layer, 0)  # compiles
        count = min(FEW, pilot.layer.num_experts)
        few = timed(lambda: [encode(pilot.layer, e) for e in range(count)])
    return few * (sum(layer.num_experts for layer in layers) / count) + pilot.load() + written(written_)


def refactor_time(
    weights: Weights, text: Windows | Statistics, options: RefactorOptions, unit: int, disk: OnDisk | None = None
) -> Seconds | None:
    """Of a refactoring, with its calibration unless there are statistics. unit: neurons that move together. disk: as of `pass_time`.

    A layer at a time the work is the same, but that nothing is kept for a continuation inside the pass.
    """
    if weights.stream is None or options.keep:
        return None
    pilot, ids, low = Pilot(weights.path, disk is not None), _ids(text), options.calibration.low_memory
    known = _refactor_known(weights, pilot, text, options, unit)
    total = _solving_total(known, weights.layers[0], len(weights.layers))
    if not isinstance(text, Statistics):
        run = settings(options.calibration)
        total += _pass_total(known, pilot.layers, ids, text.parts, run.batch)
        if not low:
            total += written(2 * declared_bytes(weights.layers, run, bounded_capacity(weights.layers, run)))  # snapshots
    if options.profile_tokens:
        total += _profile_total(known, pilot, options, ids.shape[1])
    # the pass is no part of these: layers are read to be solved, where the pass has not done it, and to be written
    loads = 1 if low and not isinstance(text, Statistics) else 2
    total += known["load"] * loads + written(written_bytes(weights))
    if disk:
        crossings = SOLVED + (_profile_crossings(pilot, options, ids.shape[1]) if options.profile_tokens else 0.0)
        if not isinstance(text, Statistics):
            crossings += _batches(ids, settings(options.calibration).batch, text.parts)
        total += disk.seconds(pilot, len(weights.layers), crossings)
        share = weights.bytes_per_weight / FLOAT32  # in the files' own type they lie there again, to be written
        total += disk.seconds(pilot, len(weights.layers), 1, share)
    return total


def shard_time(
    weights: Weights, text: Statistics, options: RefactorOptions, unit: int, layers: int, disk: OnDisk | None = None
) -> Seconds | None:
    """Of solving so many layers."""
    if weights.stream is None or options.keep:
        return None
    pilot = Pilot(weights.path, disk is not None)
    known = _refactor_known(weights, pilot, text, options, unit)
    total = _solving_total(known, weights.layers[0], layers) + known["load"] * (layers / len(weights.layers))
    return total + disk.seconds(pilot, layers, SOLVED) if disk else total


def _batches(ids: Tensor, size: int, parts: Sequence[tuple[str, int]]) -> int:
    return sum(1 for _ in batches(ids, size, parts))


def _ids(text: Windows | Statistics) -> Tensor:
    """What the profile runs, of statistics; else all text."""
    return text.profile if isinstance(text, Statistics) else text.ids


def _solving_total(known: Mapping[str, Seconds], layer: MoELayer, layers: int) -> Seconds:
    return known["solve"] * (layers * layer.num_experts / min(FEW, layer.num_experts))


def _refactor_known(
    weights: Weights, pilot: Pilot, text: Windows | Statistics, options: RefactorOptions, unit: int
) -> dict[str, Seconds]:
    """The pieces of a refactoring."""
    run, layer, ids = settings(options.calibration), weights.layers[0], _ids(text)
    if isinstance(text, Statistics):
        sample = SolvedRows(text.facts["capacity"], 0, [n for one in text.outlines for n in one.kept()])
    else:
        wanted = [largest_layer(weights)] if options.calibration.low_memory else weights.layers
        sample = SolvedRows(bounded_capacity(wanted, run), text.tokens * _k(pilot), [])
    rows = (sample.choices or sum(sample.kept) // len(weights.layers)) // layer.num_experts
    name = pilot.name(
        "refactor", options.n_sub, options.gates, options.solver, options.objective, options.compensate, options.rank,
        options.extra_scorers, unit, rows, sample.capacity, min(run.batch, len(ids)), ids.shape[1], len(run.domains),
        options.profile_tokens > 0, options.calibration.low_memory,
    )  # fmt: skip
    return remembered(name, lambda: _refactor_pieces(pilot, ids, options, sample, unit))


class SolvedRows(NamedTuple):
    """What experts are solved on: at most `capacity` rows of each. choices: of all experts of a layer; kept: of each, if that is known."""

    capacity: int
    choices: int
    kept: list[int]

    def rows(self, found: LayerStatistics, count: int) -> list[int]:
        """Of some experts that stand for all. found: of a part of the text, which says how unevenly experts are chosen."""
        chosen = found.values["counts"]["count"].double()
        sizes = self.kept or (chosen * (self.choices / max(1.0, float(chosen.sum())))).tolist()
        most = max(1, min(self.capacity, round(max(sizes))))
        return typical(sizes, count, min(STARVED, most), most)


def frontier_time(
    folder: Path, asked: Sequence[Method], windows: Windows, options: FrontierOptions, n_sub: int
) -> Seconds | None:
    """Of measuring the points of methods that need no fitting; None for others, with a judge, and where no layer can be run by itself."""
    fixed = all(each.acts != "weights" and not each.needs for each in asked)
    if options.low_memory or options.judge or options.given or not fixed or not folder.is_dir():
        return None
    pilot = Pilot(folder)
    ids = windows.ids
    tensors = side_tensors(folder, len(Weights(folder).layers))[0] if n_sub > 1 else {}
    name = pilot.name("frontier", [each.name for each in asked], options.per_method, n_sub, sorted(tensors), ids.shape[1])
    known = remembered(name, lambda: _frontier_pieces(pilot, ids, asked, options, (n_sub, tensors)))
    rounds = -(-len(ids) // BATCH)
    full, points = (Split(known[f"{what} inside"], known[f"{what} outside"]).of(pilot.layers) for what in ("full", "points"))
    return known["load"] + (full + points + known["decode"] * pilot.layers) * rounds + known["encode"] * pilot.layers


def repair_time(model: Any, windows: Windows, options: RecoverOptions, written_: int) -> Seconds | None:
    """Of a repair of a model that is loaded; None of other methods and of streamed models."""
    if options.method != "repair" or options.low_memory:
        return None
    elastic: Elastic = model._moe_prism
    bands = min(options.bands, elastic.layers[0].parts.n_sub - 1)
    parts = groups(elastic.layers, bands, options.memory_mib << 20)
    ids = windows.ids
    total = Seconds()
    equations(model, elastic, parts[0][:1], ids[:1], bands)  # compiles
    for group in parts:
        found: list[Normal] = []
        once = timed(partial(_sum, found, partial(equations, model, elastic, group, ids[:REPAIRED], bands)))
        few = _few_equations(found[0])
        solved = timed(few.solve) * (found[0].parts.layer.num_experts / len(few.gram[0, 0]))
        total += once * (len(ids) / REPAIRED) + solved * len(group)
    return total + written(written_)


def _sum(found: list[Normal], sums: Callable[[], list[Normal]]) -> None:
    found.extend(sums())


def _few_equations(normal: Normal) -> Normal:
    """The equations of a few experts."""
    found = Normal.__new__(Normal)
    found.parts, found.bands = normal.parts, normal.bands
    found.gram, found.cross = normal.gram[:, :, :FEW], normal.cross[:, :, :FEW]
    return found


def _pass_pieces(pilot: Pilot, ids: Tensor, options: CalibrateOptions) -> tuple[dict[str, Seconds], LayerStatistics]:
    """The first batch of a pass and a later one, inside the layer and outside; and what the layer's collectors then hold.

    A window goes before them: what is only done once must not count per layer.
    """
    run = settings(options)
    text = ids[: 2 * run.batch]
    with pilot.there():
        work = Pass(pilot.model, [pilot.layer], run)
        parts = [(run.domains[0], len(text))] if run.domains else []
        Pass(pilot.model, [pilot.layer], run).run(text[:1], parts=parts)
        first = pilot.split(lambda: work.run(text[: run.batch], parts=parts))
        later = pilot.split(lambda: work.run(text, parts=parts)) if len(text) > run.batch else first
        found = work.gathered(0)
    pieces = {
        "first inside": first.inside, "first outside": first.outside, "later inside": later.inside, "later outside": later.outside,
    }  # fmt: skip
    return {**pieces, "load": pilot.load()}, found


def _pass_total(known: Mapping[str, Seconds], layers: int, ids: Tensor, parts: Sequence[tuple[str, int]], size: int) -> Seconds:
    first, later = (Split(known[f"{when} inside"], known[f"{when} outside"]).of(layers) for when in ("first", "later"))
    full = [len(batch.ids) / size for batch in batches(ids, size, parts)]
    return known["load"] + first + later * sum(full[1:])


def _refactor_pieces(pilot: Pilot, ids: Tensor, options: RefactorOptions, sample: SolvedRows, unit: int) -> dict[str, Seconds]:
    """What a pass takes, a few experts' solution, and a row of the profile at full budget and with the layer at its own."""
    pieces, found = _pass_pieces(pilot, ids, options.calibration)
    count = min(FEW, pilot.layer.num_experts)
    with pilot.there():
        rows = sample.rows(found, count)
        solve(*few_experts(pilot.layer, found, [min(*rows, WARMING)]), options, unit)  # compiles
        few, solved = few_experts(pilot.layer, found, rows), dict[str, Tensor]()
        pieces["solve"] = timed(lambda: solved.update(solve(*few, options, unit)[0]))
        if not options.profile_tokens:
            return pieces
        tensors = for_all({k: v for k, v in solved.items() if k not in WORKING}, pilot.layer.num_experts)
        if options.calibration.low_memory:  # as the run does: compiled code would keep the layer's weights in a form of its own
            parts = LayerParts(pilot.layer, options.n_sub, options.gates, tensors)
            pilot.model._moe_prism = StreamedElastic(pilot.model, [parts])
        else:
            attach(pilot.model, options.n_sub, gates=options.gates, tensors=[tensors], layers=[pilot.layer])
        [point] = alone_points(*profile_runs(0)[0], 1)
        full, own = _runs(pilot, ids[: _profile_batch(ids)], [[], [point]])
    return pieces | {
        "full inside": full.inside, "full outside": full.outside,
        "own inside": own.inside - full.inside, "own outside": own.outside - full.outside,
    }  # fmt: skip


def _profile_batch(ids: Tensor) -> int:
    return max(1, LOGIT_ROWS // ids.shape[1])


def _profile_total(known: Mapping[str, Seconds], pilot: Pilot, options: RefactorOptions, length: int) -> Seconds:
    """Every layer alone below full budget, once per run, beside the full model.

    A layer at a time, such a run begins at its layer, and nothing is loaded for it.
    """
    rounds = _profile_rounds(options, length)
    runs = pilot.layers * (1 + options.profile_points)
    full = known["full inside"] * pilot.layers + known["full outside"]
    low = options.calibration.low_memory
    others = known["full inside"] * ((pilot.layers - 1) / (2 if low else 1))
    alone = known["own inside"] + others + known["own outside"]
    return (Seconds() if low else known["load"]) + (full + alone * runs) * rounds


def _profile_crossings(pilot: Pilot, options: RefactorOptions, length: int) -> float:
    """How often a layer's experts run in the profile: in the full run, with the layer at its own budgets, and behind earlier layers."""
    runs = 1 + options.profile_points
    return _profile_rounds(options, length) * (1 + runs + runs * (pilot.layers - 1) / 2)


def _profile_rounds(options: RefactorOptions, length: int) -> float:
    return max(1, options.profile_tokens // length) / max(1, LOGIT_ROWS // length)


def _runs(pilot: Pilot, ids: Tensor, points: Sequence[Sequence[OperatingPoint]]) -> list[Split]:
    """What measuring each list of points takes on one batch, after a turn that compiles and prepares."""
    size = max(1, len(ids))
    measure(pilot.model, ids, points[-1], batch=size)
    return [pilot.split(partial(measure, pilot.model, ids, own, batch=size)) for own in points]


def _frontier_pieces(
    pilot: Pilot, ids: Tensor, asked: Sequence[Method], options: FrontierOptions, cut: tuple[int, dict[str, Tensor]]
) -> dict[str, Seconds]:
    """A batch at full budget and at all points, of which some are run, and what int8 and int4 take to encode and to decode, per layer."""
    load, batch = pilot.load(), ids[:BATCH]
    n_sub, tensors = cut
    with pilot.there():
        attach(pilot.model, n_sub, tensors=[tensors] if tensors else None, layers=[pilot.layer])
        subject = Subject(
            model=pilot.model, tokenizer=None, elastic=pilot.model._moe_prism, n_sub=n_sub, k=_k(pilot),
            read_calibration=lambda: ids, points=options.per_method,
        )  # fmt: skip
        named: list[NamedPoint] = [point for each in asked for point in each.points(subject)]
        uniform = skip_method("uniform")
        named += [uniform.point(subject, n) for n in range(1, subject.k)]
        tried = [each.point for each in spread(named, TRIED)]
        full, points = _runs(pilot, batch, [[], tried])
        rows = [each.point for each in standing_rows(subject)]
        first = pilot.split(lambda: measure(pilot.model, batch, rows, batch=BATCH))
        again = pilot.split(lambda: measure(pilot.model, batch, rows, batch=BATCH))
    one, whole = (points.outside - full.outside) * (1 / len(tried)), BATCH / len(batch)  # a text may be shorter than a batch
    every = (len(named) + len(rows)) / len(tried)
    return {
        "load": load,
        "full inside": full.inside * whole, "full outside": full.outside * whole,
        "points inside": (points.inside - full.inside) * (every * whole), "points outside": one * ((len(named) + len(rows)) * whole),
        "decode": again.outside - full.outside - one * len(rows),
        "encode": first.outside - again.outside,
    }  # fmt: skip


def _k(pilot: Pilot) -> int:
    return experts_per_token(pilot.model, pilot.layer)

"""`moe-prism frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..errors import UsageError
from ..options.frontier import FrontierOptions, TimeOptions
from .output import note, progress, table, written
from .rehearsal import Rehearsal, show_rehearsal
from .texts import told_text

if TYPE_CHECKING:
    from ..frontier import Frontier, MeasuredPoint, SliceScore

HEADERS = ("point", "slots", "KL", "perplexity", "top-1", "expert MB", "of full", "MFLOPs", "sends", "resident MB", "Pareto")


def frontier(
    folder: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: FrontierOptions,
    timing: TimeOptions,
    rehearsal: Rehearsal,
    json: bool = False,
) -> None:
    """Measure quality and cost of every operating point of a model, beside plain top-k; writes JSON and an HTML report.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, or any checkpoint (give --out, and methods that need no sub-experts).
    out: Folder for frontier.json, report.html and frontier.png; default is FOLDER itself, whose prism.json then lists the points.
    json: One JSON object on stdout.
    """
    from ..files import check_writable_folder
    from ..model.hub import lies_in_cache

    if timing.time and options.low_memory:
        raise UsageError("--time decodes with the model in memory", "leave it or --low-memory out")
    check_writable_folder(out)
    if out is None and not (folder / "prism.json").is_file():
        raise UsageError(f"'{folder}' has no prism.json", "give a folder that moe-prism wrote, or --out FOLDER for the report")
    if out is None and lies_in_cache(folder):
        raise UsageError(f"'{folder.name}' lies in the hub's cache, where nothing is written", "give --out FOLDER")
    from ..jobs.frontier import measure_frontier as run
    from ..jobs.frontier_files import keep_frontier, write_frontier
    from ..jobs.which_text import texts_of

    options, report = told_text(folder, options, "evaluation text", f"; calibrated on: {texts_of(folder)['calibrated_on']}")
    if rehearsal.dry_run:
        return show_rehearsal(rehearsal, run, folder, options, as_json=json)
    result = run(folder, options, report=report)
    target = out or folder
    keep = keep_frontier if out is None else write_frontier
    if timing.time:
        keep(result, target)  # the quality is not lost if the timing fails
        result = _timed(folder, result, options, timing)
    facts = result.to_json()
    judged = f"\n\n{show_slices(result)}" if any(p.slices for p in result.every) else ""
    with written(facts, f"{show(result)}{judged}\n\n{show_comparison(result)}", json):
        keep(result, target)
    note(f"report: {target / 'report.html'}")
    return None


def _timed(folder: Path, result: Frontier, options: FrontierOptions, timing: TimeOptions) -> Frontier:
    from ..jobs.time_points import Timing, time_frontier

    return time_frontier(folder, result, Timing(batch=timing.time_batch or 1, **options.source.facts()), report=progress)


def show(result: Frontier) -> str:
    """The frontier as a table, dearest point first; expert MB are read per token, a MB is 10^6 bytes; sends are devices per layer."""
    every = result.every
    full = max(p.active_expert_bytes for p in every if p.budget >= 1)
    timed, sliced, judged = any(p.time for p in every), any(p.domains for p in every), any(p.slices for p in every)
    rows = [
        (
            p.name,
            f"{p.k_slots:.2f}",
            f"{p.kl:.4f}",
            f"{p.ppl:.3f}",
            f"{p.top1_agreement:.1%}",
            f"{p.active_expert_bytes / 1e6:.3f}",
            f"{p.active_expert_bytes / full:.1%}",
            f"{p.flops_per_token / 1e6:.3f}",
            f"{p.sends:.2f}",
            f"{p.resident_expert_bytes / 1e6:.3f}",
            "yes" if p.pareto else "-",
            *(_worst(p) if sliced else ()),
            *(_worst_slice(p) if judged else ()),
            *(_time(p) if timed else ()),
        )
        for p in sorted(every, key=lambda p: -p.active_expert_bytes)
    ]
    worst = (*(("worst domain",) if sliced else ()), *(("worst slice",) if judged else ()))
    more = (*worst, *(("ms/token", "of stock") if timed else ()))
    return table((*HEADERS, *more), rows)


def _worst(point: MeasuredPoint) -> tuple[str]:
    """The domain with the largest KL, and that."""
    name = point.worst_domain
    return (f"{name} {point.domains[name].kl:.4f}" if name else "-",)


def _worst_slice(point: MeasuredPoint) -> tuple[str]:
    """The slice of which least is kept, and that."""
    name = point.worst_slice
    return (f"{name} {point.slices[name].kept:.1%}" if name else "-",)


def show_slices(result: Frontier) -> str:
    """What every point keeps of each slice, with standard errors and flips, and which points keep too little."""
    from ..report.summary import judged_points, judgement, slice_names

    names = slice_names(result)
    rows = [
        (p.name, *(_kept(p.slices[name]) if name in p.slices else "-" for name in names))
        for p in sorted(judged_points(result), key=lambda p: -p.active_expert_bytes)
    ]
    left = [f"not judged: {name}: {why}" for name, why in result.provenance.get("judge", {}).get("left_out", {}).items()]
    shown = table(("kept of the full model's (flips)", *names), rows)
    return "\n".join([shown, *filter(None, [judgement(result)]), *left])


def _kept(found: SliceScore) -> str:
    return f"{100 * found.kept:.1f} ± {100 * found.stderr:.1f} ({100 * found.flips:.1f})"


def _time(point: MeasuredPoint) -> tuple[str, str]:
    """Median and quartiles; ratio to the full model without us."""
    time = point.time
    return (f"{time.ms_per_token:.2f} ({time.low:.2f}-{time.high:.2f})", f"{time.of_stock:.2f}x") if time else ("-", "-")


def show_comparison(result: Frontier) -> str:
    """How the rules compare over the whole range."""
    from ..frontier import comparison

    rows = [
        (r.rule, r.points, r.distinct, f"{r.hypervolume:.4f}", f"{r.sends:.4f}", f"{r.cliff:.1%}") for r in comparison(result)
    ]
    return table(("rule", "points", "distinct", "hypervolume", "by sends", "largest cliff"), rows)

"""`moe-prism compress`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options import option
from ..options.compress import CompressOptions
from .flags import Run
from .output import emit, note, note_left_out, progress
from .rehearsal import Rehearsal, duration, with_start


@dataclass(frozen=True, kw_only=True)
class Trial(Rehearsal):
    """Whether anything is written."""

    report_only: bool = option(False, "Say how far the weights would move, or what would go, and write nothing.")
    calibration: Path | None = option(
        None, "Of neurons and merging: folder written by `moe-prism calibrate --collectors ...`, instead of the text options."
    )


def compress(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: CompressOptions,
    trial: Trial,
    run: Run,
) -> None:
    """Write a checkpoint whose experts take fewer bits, have fewer neurons or were merged, which unmodified transformers and vLLM load.

    Parameters
    ----------
    model: Folder with config.json and safetensors, 'nano' or 'nano-mix'.
    out: Folder to write, or the file of --format records. It appears only when it is complete.
    """
    from ..jobs.compress import compress_model, measure_compression

    if trial.dry_run and trial.report_only:
        raise UsageError("--dry-run and --report-only exclude each other", "give one of them")
    if trial.dry_run:
        _show_plan(model, out, options, trial, run)
        return
    if trial.report_only:
        result = measure_compression(model, options, calibration=trial.calibration, report=progress)
    elif out is None:
        raise UsageError("there is no output folder", "give --out FOLDER, --dry-run or --report-only")
    else:
        given = trial.calibration
        result = compress_model(model, out, options, calibration=given, resume=run.resume, force=run.force, report=progress)
        if options.format != "records":
            note(f"next: moe-prism verify {out}")
    facts = result.to_json()
    note_left_out(facts.get("left_out", {}))
    emit(facts, _show(facts), run.json)


def _show_plan(model: str, out: Path | None, options: CompressOptions, trial: Trial, run: Run) -> None:
    """What would be written, and what writing it needs; then DoesNotFit where this machine has less."""
    from ..artefact.output import Writing
    from ..jobs.compress import compress_model, plan_compression
    from ..jobs.rehearsal import rehearse
    from ..jobs.resources import check_resources

    started = time.process_time()  # what the real run spends before it, too
    facts = plan_compression(model, options, calibration=trial.calibration).to_json()
    needed, machine = {}, trial.machine()
    if options.format != "records":
        with tempfile.TemporaryDirectory() as scratch:
            target, own = out or Path(scratch) / "out", Writing(force=run.force, resume=run.resume)
            needed = rehearse(
                compress_model, model, target, options, machine=machine, calibration=trial.calibration, **own
            ).to_json()
        needed = with_start(needed, started)
        facts["needed"] = needed
    if not run.json:  # shown even where it does not fit; stdout of --json holds one object, then that of the error
        emit(facts, _show(facts), run.json)
    if needed:
        check_resources(needed, out or Path.cwd(), machine=machine)
    if run.json:
        emit(facts, "", run.json)


def _show(facts: dict[str, Any]) -> str:
    before, after = facts["expert_bytes"]["before"], facts["expert_bytes"]["after"]
    where = f"{facts['folder']}: " if "folder" in facts else ""
    size = f"{before / 1e6:.3f} MB -> {after / 1e6:.3f} MB ({after / before:.1%})"
    if "experts" in facts:
        return f"{where}experts {size}, {facts['method']}\n{_experts(facts['experts'])}{_needed(facts)}"
    if "neurons" in facts:
        return f"{where}experts {size}, {facts['method']}\n{_neurons(facts['neurons'])}{_needed(facts)}"
    error = facts["relative_error"]
    moved = "" if error is None else f"\nsquared error of the weights: {error:.2e} of their squares"
    return f"{where}{facts['matrices']} matrices of experts, {size}, {facts['method']}{moved}{_needed(facts)}"


def _experts(found: dict[str, Any]) -> str:
    """What stays, and what files cannot say."""
    if found["written"] < found["of"]:
        return f"every layer has {found['written']} of {found['of']} experts"
    share = found.get("stored_once", found["share"])
    return f"merged experts stand in the places of all their members: stored once each, experts take {share:.1%}"


def _neurons(found: dict[str, Any]) -> str:
    """What stays, and what the form of the files takes more than the method alone would."""
    if found["width"] is None:
        width = f", {found['narrowest']} to {found['widest']} of {found['of']} per expert" if "widest" in found else ""
        words = (
            f"{found['share']:.1%} of the neurons stay{width}, the others become zeros: stored without those {found['share']:.1%}"
        )
    else:
        words = f"every expert keeps {found['width']} of {found['of']} neurons ({found['share']:.1%}, asked {found['asked']:.1%})"
    if "score_lost" in found:
        lost, alone = found["score_lost"], found["score_lost_by_the_method_alone"]
        words += f"\nof the sum of scores {lost:.2%} goes" + (
            "" if lost == alone else f", in the widths of the method's own {alone:.2%}"
        )
    return words


def _needed(facts: dict[str, Any]) -> str:
    needed = facts.get("needed")
    if not needed:
        return ""
    sizes = f"needs {needed['peak_memory_bytes'] / 1e9:.2f} GB of memory and {needed['disk_bytes'] / 1e9:.2f} GB of disk"
    return f"\n{sizes}\n{duration(needed)}"

"""`moe-prism prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options import Options, option
from ..options.prune import PruneOptions
from .flags import Run
from .output import emit, note, note_left_out, progress, table
from .rehearsal import Rehearsal, show_rehearsal


@dataclass(frozen=True, kw_only=True)
class Ways(Options):
    """Where the selection comes from, and whether a model is written."""

    calibration: Path | None = option(
        None, "Folder written by `moe-prism calibrate --collectors ...`, instead of the text options."
    )
    kept: Path | None = option(None, "A kept.json to repeat, instead of a criterion.")
    report_only: bool = option(False, "Write no model; print which experts would stay.")


def prune(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: PruneOptions,
    ways: Ways,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Write a checkpoint with fewer experts, which unmodified transformers and vLLM load; or say which experts would stay.

    With --form constant the mean output of an expert takes its place: vLLM 0.33 and moe-prism load that, transformers refuses it.

    Parameters
    ----------
    model: Folder with config.json and safetensors, plain or written by `moe-prism refactor`, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete. kept.json in it lists the experts that stayed.
    """
    from ..jobs.prune import prune_model, select_experts

    if ways.report_only:
        result = select_experts(model, options, calibration=ways.calibration, report=progress)
    elif out is None:
        raise UsageError("there is no output folder", "give --out FOLDER, or --report-only")
    else:
        given = {"calibration": ways.calibration, "kept": ways.kept}
        if rehearsal.dry_run:
            how = {"resume": run.resume, "force": run.force}
            return show_rehearsal(rehearsal, prune_model, model, out, options, target=out, as_json=run.json, **given, **how)
        result = prune_model(model, out, options, **given, resume=run.resume, force=run.force, report=progress)
        note(f"next: moe-prism verify {out}")
    facts = result.to_json()
    note_left_out(facts.get("left_out", {}))
    emit(facts, _show(facts), run.json)
    return None


def _show(facts: dict[str, Any]) -> str:
    rows = [(row["layer"], f"{len(row['kept'])}/{row['experts']}", _ranges(row["kept"])) for row in facts["layers"]]
    lines = table(("layer", "kept", "ids"), rows)
    where = f"{facts['folder']}: " if "folder" in facts else ""
    return f"{lines}\n{where}{facts['criterion']}, {facts['resident_share']:.0%} of the expert weights stay in memory"


def _ranges(ids: list[int]) -> str:
    """1 2 3 7 -> 1-3,7."""
    parts: list[list[int]] = []
    for e in ids:
        if parts and e == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], e]
        else:
            parts.append([e])
    return ",".join("-".join(map(str, part)) for part in parts)

"""`moe-prism prune`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import UsageError
from .output import emit, note, progress, table


def prune(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    criterion: str = "easy-ep",
    keep: float = 0.5,
    allocation: Literal["layer", "global", "measured"] = "layer",
    groups: Literal["per_group", "regroup", "mask", "drop_groups"] = "per_group",
    protect: str = "",
    kept: Path | None = None,
    text: str = "stdlib",
    tokens: int = 65_536,
    length: int = 512,
    seed: int = 0,
    profile_tokens: int = 2048,
    calibration: Path | None = None,
    low_memory: bool = False,
    report_only: bool = False,
    resume: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a checkpoint with fewer experts, which unmodified transformers loads; or say which experts would stay.

    Parameters
    ----------
    model: Folder with config.json and safetensors, plain or written by `moe-prism refactor`, or 'nano'.
    out: Folder to write. It appears only when it is complete. kept.json in it lists the experts that stayed.
    criterion: What ranks the experts; see `moe-prism ls prune-criteria`.
    keep: Share of the experts that stays, 0 to 1; a layer keeps at least as many as a token uses.
    allocation: layer: the same number everywhere, the only form a checkpoint can have. global: one ranking over all layers. measured: by
        what the model loses with each layer alone pruned. The last two are for --report-only and mask mode.
    groups: Of group-limited routers: per_group keeps equally many in each, regroup deals the kept into equal groups, drop_groups removes
        whole groups, mask leaves groups unequal (mask mode only).
    protect: Comma-separated protections, e.g. super-experts: experts that stay whatever the criterion says.
    kept: A kept.json to repeat, instead of a criterion.
    text: Calibration text: stdlib, topics, a file, a folder, a .jsonl file or a saved dataset. Its evaluation side is never used.
    tokens: Calibration tokens.
    length: Tokens per window.
    seed: Of the criterion random.
    profile_tokens: Of measured: calibration tokens that every layer is run alone on.
    calibration: Folder written by `moe-prism calibrate --collectors ...`, instead of the text options.
    low_memory: Keep one decoder layer in memory at a time.
    report_only: Write no model; print which experts would stay.
    resume: Continue an interrupted run; ends in the same bytes.
    force: Replace an existing output.
    json: One JSON object on stdout.
    """
    from ..calibrate.options import CalibrateOptions
    from ..jobs.prune import prune_model, select_experts
    from ..methods.prune.select import PruneOptions

    options = PruneOptions(
        criterion,
        keep,
        allocation,
        groups,
        [name for name in protect.split(",") if name],
        seed,
        profile_tokens,
        CalibrateOptions(text, tokens, length, low_memory=low_memory),
    )
    if report_only:
        result = select_experts(model, options, calibration=calibration, report=progress)
    elif out is None:
        raise UsageError("there is no output folder", "give --out FOLDER, or --report-only")
    else:
        result = prune_model(model, out, options, calibration=calibration, kept=kept, resume=resume, force=force, report=progress)
        note(f"next: moe-prism verify {out}")
    facts = result.to_json()
    emit(facts, _show(facts), json)


def _show(facts: dict[str, Any]) -> str:
    rows = [(row["layer"], f"{len(row['kept'])}/{row['experts']}", _ranges(row["kept"])) for row in facts["layers"]]
    lines = table(("layer", "kept", "ids"), rows)
    where = f"{facts['folder']}: " if "folder" in facts else ""
    return f"{lines}\n{where}{facts['criterion']}, {facts['resident_share']:.0%} of the expert weights stay in memory"


def _ranges(ids: list[int]) -> str:
    """1 2 3 7 -> 1-3,7"""
    parts: list[list[int]] = []
    for e in ids:
        if parts and e == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], e]
        else:
            parts.append([e])
    return ",".join("-".join(map(str, part)) for part in parts)

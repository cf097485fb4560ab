"""`moe-prism recover`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note, progress


def recover(
    folder: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    method: str = "repair",
    bands: int = 1,
    steps: int = 96,
    text: str | None = None,
    tokens: int = 65_536,
    length: int = 512,
    memory_mib: int = 4096,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a copy of an elastic model that loses less below full budget. At full budget it is the same model.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`.
    out: Folder to write. It appears only when it is complete.
    method: repair: W_down of cut experts, by least squares. predictor: the predictor, trained to choose slots; for both, run it
        before repair.
    bands: Of repair: copies of W_down, each for a range of dropped sub-experts, at most n_sub - 1; each adds a third of the
        expert weights to memory.
    steps: Of predictor: training steps of two windows.
    text: Calibration text: stdlib, a file, a folder, a .jsonl file or a saved dataset; default: what FOLDER was calibrated on.
    tokens: Calibration tokens.
    length: Tokens per window.
    memory_mib: Of repair: limit for the equations of the layers that are summed in one pass.
    seed: Of predictor: which windows and budgets are drawn.
    resume: Continue an interrupted repair; ends in the same bytes. Training starts again.
    force: Replace an existing output.
    json: One JSON object on stdout.
    """
    from ..jobs.recover import RecoverOptions
    from ..jobs.recover import recover_model as run

    options = RecoverOptions(method, bands, steps, text, tokens, length, memory_mib, seed)
    result = run(folder, out, options, resume=resume, force=force, report=progress)
    facts = result.to_json()
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['method']} from {facts['tokens']} tokens, "
        f"{facts['resident_bytes'] / 2**20:.1f} MiB more in memory ({facts['resident_share']:.0%} of the expert weights), "
        f"peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB",
        json,
    )

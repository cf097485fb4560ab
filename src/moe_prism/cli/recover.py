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
    bands: int = 1,
    text: str | None = None,
    tokens: int = 65_536,
    length: int = 512,
    memory_mib: int = 4096,
    resume: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a copy of an elastic model that loses less below full budget: W_down of cut experts, repaired by least squares.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`.
    out: Folder to write. It appears only when it is complete.
    bands: Repaired copies of W_down, each for a range of dropped sub-experts; each adds about a third of the expert bytes to memory.
    text: Calibration text: stdlib, a file, a folder, a .jsonl file or a saved dataset; default: what FOLDER was calibrated on.
    tokens: Calibration tokens.
    length: Tokens per window.
    memory_mib: Limit for the equations of the layers that are summed in one pass.
    resume: Continue an interrupted run; ends in the same bytes.
    force: Replace an existing output.
    json: One JSON object on stdout.
    """
    from ..api import RecoverOptions
    from ..api import recover_model as run

    result = run(
        folder, out, RecoverOptions(bands, text, tokens, length, memory_mib), resume=resume, force=force, report=progress
    )
    facts = result.to_json()
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['bands']} repaired copies of W_down per expert from {facts['tokens']} tokens, "
        f"{facts['resident_bytes'] / 2**20:.1f} MiB more in memory ({facts['resident_share']:.0%} of the expert weights), "
        f"peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB",
        json,
    )

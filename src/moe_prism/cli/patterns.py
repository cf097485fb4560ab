"""`moe-prism patterns`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note


def patterns(
    statistics: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    json: bool = False,
) -> None:
    """Write which experts each domain of a calibration needs (PreMoE): a small file that `serve --patterns` reads.

    Parameters
    ----------
    statistics: Folder written by `moe-prism calibrate --collectors confidence --domain NAME=PATH ...`.
    out: The .json file to write.
    json: One JSON object on stdout.
    """
    from ..files import check_writable

    check_writable(out)
    from ..jobs.patterns import write_patterns

    facts = write_patterns(statistics, out).to_json()
    note(f"next: moe-prism serve MODEL --patterns {out} --task {facts['tasks'][0]}")
    emit(facts, f"{out}: {', '.join(facts['tasks'])}, {facts['bytes'] / 1024:.0f} KiB", json)

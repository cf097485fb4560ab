"""`moe-prism verify`."""

from __future__ import annotations

from pathlib import Path

from .output import emit


def verify(folder: Path, /, *, json: bool = False) -> None:
    """Check every file of an output folder against its manifest: hashes, headers, finite values. Exit code 4 if something is wrong.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, `prune`, `recover` or `calibrate`.
    json: One JSON object on stdout.
    """
    from ..jobs.verify import verify as run

    checks = run(folder)
    text = "\n".join(f"ok  {check.name}: {check.detail}" for check in checks)
    emit(checks.to_json(), text, json)

"""What every way of `recover` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..result import Result

FILLED_IN = ("schema", "versions", "files", "sha256")
"""Keys of a manifest that its writer sets."""


@dataclass(frozen=True)
class Recovered(Result):
    """The folder, its manifest, and the peak memory of this process."""

    folder: Path
    manifest: dict[str, Any]
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Facts of the run as plain JSON values."""
        facts = self.manifest["recovery"][-1]
        return {
            "folder": str(self.folder),
            **{key: facts[key] for key in ("method", "tokens", "resident_bytes", "resident_share")},
            "peak_rss_bytes": self.peak_rss_bytes,
        }

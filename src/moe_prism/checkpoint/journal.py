"""What a long job has finished, so that an interruption loses at most the unit in flight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..files import replace_file
from .atomic import JOURNAL, sha256_file
from .shards import is_file_name


class Journal:
    """`journal.json` in a work folder: unit name -> file and sha256, valid for one fingerprint.

    fingerprint: JSON facts that decide the result (source hashes, options, versions). An existing journal with another
    fingerprint is a UsageError that names the first differing key and both values; an unreadable one is a CorruptError.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = Path(folder) / JOURNAL
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint)))
        self._units: dict[str, dict[str, str]] = {}
        self._trusted: set[str] = set()
        if self.path.exists():
            self._read()
        else:
            self._write()

    def units(self) -> list[str]:
        return list(self._units)

    def sha256(self, unit: str) -> str:
        return self._units[unit]["sha256"]

    def done(self, unit: str) -> bool:
        """True if the unit is listed and its file still has the listed sha256 (hashed once per run)."""
        if unit not in self._units or unit in self._trusted:
            return unit in self._trusted
        entry = self._units[unit]
        file = self.path.parent / entry["file"]
        if file.is_file() and not file.is_symlink() and sha256_file(file) == entry["sha256"]:
            self._trusted.add(unit)
        return unit in self._trusted

    def finish(self, unit: str, file: str, sha256: str) -> None:
        """Record a unit; call after its file is in place."""
        self._units[unit] = {"file": file, "sha256": sha256}
        self._trusted.add(unit)
        self._write()

    def _write(self) -> None:
        replace_file(
            self.path, json.dumps({"fingerprint": self.fingerprint, "units": self._units}, indent=1, sort_keys=True).encode()
        )

    def _read(self) -> None:
        try:
            value: Any = json.loads(self.path.read_bytes().decode("utf-8"))
            old, units = value["fingerprint"], value["units"]
            good = isinstance(old, dict) and all(is_file_name(u["file"]) and isinstance(u["sha256"], str) for u in units.values())
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise CorruptError(f"{self.path} is not a journal", "use --force to start again")
        for key in sorted({*old, *self.fingerprint}):
            then, now = old.get(key), self.fingerprint.get(key)
            if then != now:
                raise UsageError(
                    f"the unfinished work was started with another {key}: {then!r} then, {now!r} now",
                    "repeat the command as it was, or use --force to start again",
                )
        self._units = dict(units)

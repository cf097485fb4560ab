"""What a long job has finished, so that an interruption loses at most the unit in flight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import replace_file
from ..schema import read_form
from ..schema.journal import JournalForm
from ..schema.read import one_line
from .atomic import JOURNAL, sha256_file
from .versions import device, versions

SHOWN = 300  # characters of a fingerprint's value


class Journal:
    """`journal.json` in a work folder: a finished file -> its sha256, valid for one fingerprint.

    fingerprint: JSON facts that decide the result (source hashes, options); the device and the versions of the libraries are added. An
    existing journal with another one is a UsageError that names the first differing key and both values; an unreadable one is a
    CorruptError.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = Path(folder) / JOURNAL
        self.fingerprint: dict[str, Any] = json.loads(json.dumps({"versions": versions(), "device": device(), **fingerprint}))
        self._units: dict[str, str] = {}
        self._trusted: set[str] = set()
        if self.path.exists():
            self._read()
        else:
            self._write()

    def units(self) -> list[str]:
        return list(self._units)

    def sha256(self, unit: str) -> str:
        return self._units[unit]

    def done(self, unit: str) -> bool:
        """True if the unit is listed and its file still has the listed sha256 (hashed once per run)."""
        if unit not in self._units or unit in self._trusted:
            return unit in self._trusted
        file = self.path.parent / unit
        if file.is_file() and not file.is_symlink() and sha256_file(file) == self._units[unit]:
            self._trusted.add(unit)
        return unit in self._trusted

    def finish(self, unit: str, sha256: str) -> None:
        """Record the file `unit`; call after it is in place."""
        self._units[unit] = sha256
        self._trusted.add(unit)
        self._write()

    def _write(self) -> None:
        replace_file(
            self.path, json.dumps({"fingerprint": self.fingerprint, "units": self._units}, indent=1, sort_keys=True).encode()
        )

    def _read(self) -> None:
        form = read_form(JournalForm, self.path, "use --force to start again")
        self.check(form.fingerprint, "the unfinished work", "repeat the command as it was, or use --force to start again")
        self._units = dict(form.units)

    def check(self, other: Mapping[str, Any], who: str, advice: str) -> None:
        """UsageError where another fingerprint is not this one; names the first key that differs."""
        for key in sorted({*other, *self.fingerprint}):
            then, now = other.get(key), self.fingerprint.get(key)
            if then != now:
                then, now = (one_line(repr(value), SHOWN) for value in (then, now))
                raise UsageError(f"{who} was started with another {key}: {then} then, {now} now", advice)

"""`journal.json` of unfinished work."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MaxLen

from .common import MOST_FILES, FileName, Form, Plain, Sha256


class JournalForm(Form):
    """fingerprint: what decides the result; units: a finished file -> its sha256. A unit is its file: it can name no other."""

    fingerprint: Plain
    units: Annotated[dict[FileName, Sha256], MaxLen(MOST_FILES)]

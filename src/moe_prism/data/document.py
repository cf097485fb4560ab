"""A named piece of text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from .buckets import bucket_of


@dataclass(frozen=True)
class Document:
    """A named piece of text. The name decides the split; of a row of a table, or a piece of a long file, what it says (`is_part`)."""

    name: str
    text: str
    is_part: bool = False

    @cached_property
    def sha256(self) -> str:
        """Of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def bucket(self) -> int:
        """0..39, see `bucket_of`."""
        return bucket_of(self.sha256 if self.is_part else self.name)

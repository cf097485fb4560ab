"""The MD5 of a file's base name puts it into one of 40 buckets; two of them no shipped model was trained on."""

from __future__ import annotations

import hashlib
from pathlib import PurePath

BUCKETS = 40
HELD_OUT, CALIBRATION = 0, 1  # the buckets that prism-nano and prism-nano-mix have not seen


def bucket_of(name: str) -> int:
    """0..39 from the base name of a file."""
    base = PurePath(name).name
    return int(hashlib.md5(base.encode(), usedforsecurity=False).hexdigest(), 16) % BUCKETS

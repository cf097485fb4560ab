"""What `moe-prism eval` looks at before it imports lm-eval and a model's libraries, which takes seconds."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from ..checkpoint.manifest import MANIFEST
from ..errors import UsageError
from ..model.hub import lies_in_cache


def check_installed() -> None:
    """UsageError without lm-eval."""
    if (sys.modules["lm_eval"] if "lm_eval" in sys.modules else find_spec("lm_eval")) is None:
        raise UsageError("eval needs lm_eval", "pip install 'moe-prism[eval]'")


def check_target(folder: Path, out: Path | None) -> Path:
    """Where the result goes. UsageError for a folder that is not ours to write into."""
    if out is None and (not (folder / MANIFEST).is_file() or lies_in_cache(folder)):
        raise UsageError(f"'{folder}' was not written by moe-prism", "give --out FOLDER for the result")
    return out or folder

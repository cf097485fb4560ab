"""Models of a hub as files on this machine: from its local cache, and over the network where they are not there and it may be asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError

VARIABLE = "MOE_PRISM_REVISION"  # in the environment, like those of `model/place.py`
WEIGHTS = "*.safetensors"
DATA = (WEIGHTS, "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
WORDS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"{_PART}/{_PART}")
_FILE = re.compile(rf"({_PART}/{_PART})/(.+\.gguf)")


def is_hub_name(text: str) -> bool:
    """Whether this can be OWNER/MODEL, or OWNER/MODEL/FILE.gguf, and is no path that exists."""
    return bool(_NAME.fullmatch(text) or _FILE.fullmatch(text)) and not Path(text).exists()


def lies_in_cache(folder: str | Path) -> bool:
    """Whether a folder is a snapshot of a hub's cache, which is not ours to write into."""
    home = Path(folder).absolute().parent
    return home.name == "snapshots" and home.parent.name.startswith("models--")


@contextmanager
def at_revision(revision: str | None) -> Iterator[None]:
    """Inside, and in processes started there, names of a hub stand for this branch, tag or commit."""
    before = os.environ.get(VARIABLE)
    if revision is not None:
        os.environ[VARIABLE] = revision
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({} if before is None else {VARIABLE: before})


def fetched(name: str, *, weights: bool = True) -> Path:
    """The snapshot of a hub name in the local cache, or the .gguf file of OWNER/MODEL/FILE.gguf. UsageError where it cannot be had.

    Offline (HF_HUB_OFFLINE=1) only the cache is looked at. Never runs code, and fetches files that are data only.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from ..schema.read import one_line

    patterns = [p for p in (*DATA, *WORDS) if weights or p != WEIGHTS]
    file, revision, offline = _FILE.fullmatch(name), os.environ.get(VARIABLE) or None, constants.is_offline_mode()
    try:
        if file:
            return Path(hf_hub_download(file[1], file[2], revision=revision, local_files_only=offline))
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline)
        return Path(found)
    except LocalEntryNotFoundError as error:
        where = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
        why = "the hub may not be asked (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
        raise UsageError(f"{where} is no folder here and not in the hub's cache, and {why}", "check the name") from error
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        reason = one_line(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)
        raise UsageError(f"cannot fetch '{name}': {reason}", "check the name, the revision and the connection") from error

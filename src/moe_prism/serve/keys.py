"""Who may use a server, and what it leaves to others on its machine."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError
from ..options.serve import ListenOptions, ServeOptions

logger = logging.getLogger(__name__)

VARIABLE = "MOE_PRISM_API_KEY"
LARGEST = 1 << 16
"""Bytes of a file of keys."""


def keys(options: ListenOptions, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of a server: of the command line, with a warning, of a file, or of the environment. None of them: no key is asked for."""
    if options.api_key and options.api_key_file:
        raise UsageError("--api-key and --api-key-file are both given", "leave --api-key out")
    if options.api_key:
        logger.warning("--api-key can be seen by everybody on this machine; use --api-key-file, or the variable %s", VARIABLE)
        return (options.api_key,)
    if options.api_key_file:
        return _read(options.api_key_file)
    return (found,) if (found := environment.get(VARIABLE)) else ()


def admin_keys(options: ServeOptions) -> tuple[str, ...]:
    """Those of administrators; none where nothing is administered. UsageError where one of them is a key of clients too."""
    if options.admin_key_file is None:
        return ()
    found = _read(options.admin_key_file)
    if set(found) & set(keys(options)):
        raise UsageError("a key of --admin-key-file is a client's key too", "give administrators keys of their own")
    return found


def _read(path: Path) -> tuple[str, ...]:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
        if size > LARGEST:
            raise UsageError(f"'{path}' is too large for a file of keys", f"give one of at most {LARGEST} bytes")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the keys in '{path}': {getattr(error, 'strerror', None) or 'not UTF-8'}", "check the file"
        ) from error
    found = tuple(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UsageError(f"'{path}' has no key", "write one per line")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("others can read the file of keys; chmod 600")
    return found


def keep_private() -> None:
    """What is written from now on is the user's own, and memory is not written to disk when a process dies. Children inherit both."""
    os.umask(0o077)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

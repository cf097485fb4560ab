"""What happens where this vLLM can serve the full model only: the operator is told at the start, and a request for less gets 400."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import PrismError, UsageError
from .levels import SECTION, Menu

logger = logging.getLogger(__name__)

FOLDER, POINTS = "MOE_PRISM_VLLM_FOLDER", "MOE_PRISM_VLLM_POINTS"
"""Environment variables that tell API server processes, which vLLM spawns, whose levels to check names against: those of named points."""

REASON = "MOE_PRISM_VLLM_FULL_ONLY"
"""Environment variable: a file that says why only the full model is served; empty as long as nothing speaks against less. A file, because
the worker that finds out runs beside the process that answers requests, and has no other way to it."""


def own_options(config: Any) -> dict[str, Any]:
    """What the operator set under `moe_prism` of --additional-config."""
    return {key: value for key, value in config.additional_config.get(SECTION, {}).items() if key != "wired"}


def prepare() -> None:
    """Make the file, or empty that of an earlier engine of this process, before the processes start that share it."""
    path = os.environ.get(REASON)
    if path and Path(path).is_file():
        Path(path).write_text("")
        return
    handle, path = tempfile.mkstemp(prefix="moe-prism-vllm-")
    os.close(handle)
    os.environ[REASON] = path
    atexit.register(_remove, path, os.getpid())


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:
        with contextlib.suppress(OSError):
            Path(path).unlink()


def full_only(problem: str, menu: Menu, options: dict[str, Any]) -> None:
    """Say that only the full model is served. UsageError where the operator asked for less, by a default or by naming points."""
    if menu.default.floor < menu.ladder.top or options.get("points"):
        raise UsageError(
            f"moe-prism cannot serve a quality below 1: {problem}",
            f"leave quality and points of {SECTION} out of --additional-config",
        )
    logger.warning("moe-prism: %s; full quality is served, and requests for less are refused", problem)
    path = os.environ.get(REASON)
    if path:
        Path(path).write_text(problem)


@cache
def menu_of(folder: str, points: str) -> Menu:
    """The levels that names are checked against, of the points that are named in a JSON list; defaults do not matter here."""
    return Menu.of(Path(folder), {"points": json.loads(points)})


def check(fields: Mapping[str, Any]) -> None:
    """ValueError for fields of a request that mean nothing, or ask for less than full quality where nothing else is served."""
    folder = os.environ.get(FOLDER)
    if not folder or not fields:
        return
    menu = menu_of(folder, os.environ.get(POINTS, "[]"))
    try:
        wanted = menu.read(fields)
    except PrismError as error:
        raise ValueError(str(error)) from error
    why = reason() if wanted.floor < menu.ladder.top else None
    if why:
        raise ValueError(f"this server gives full quality only: {why}; leave quality and min_quality out")


def reason() -> str | None:
    """Why only the full model is served; None where that is not so."""
    try:
        return Path(os.environ.get(REASON) or "/nowhere").read_text() or None
    except OSError:
        return None

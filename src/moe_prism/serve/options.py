"""What `moe-prism serve` is told on the command line. Both processes of a server get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line knows its options without loading torch
    from ..store import StoreOptions


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The command's options. cost: a cost model saved by `--save-cost`, instead of measuring at start; store: experts stay on disk;
    points: names of measured operating points to serve, or a frontier.json; empty: the best of all that can share a batch; debug: plain
    logs."""

    host: str = "127.0.0.1"
    port: int = 8000
    policy: str | None = None
    config: Path | None = None
    api_key: str | None = None
    name: str | None = None
    cost: Path | None = None
    save_cost: Path | None = None
    probe_seconds: float = 4.0
    store: StoreOptions | None = None
    points: tuple[str, ...] = ()
    debug: bool = False

"""A measured frontier as one offline HTML page and as a picture. Needs the extra `moe-prism[report]`."""

from __future__ import annotations

from .html import write_png, write_report

__all__ = ["write_png", "write_report"]

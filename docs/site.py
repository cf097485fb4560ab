"""What mkdocs asks while it builds the site: pages beside docs/ are links to the repository there."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(
    r"\]\((?:\.\./)+((?:README|CONTRIBUTING|SECURITY|CHANGELOG)\.md|src/[^)]*|tests/[^)]*|benchmarks/[^)]*|recipes/[^)]*)\)"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with links out of docs/ as code: the site does not know where the repository lies."""
    return OUTSIDE.sub(lambda found: f"] (`{found[1]}`)", markdown)

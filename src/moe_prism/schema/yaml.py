"""YAML that an operator writes: bounded, plain data, and one line for whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_bounded
from .read import one_line

LARGEST = 1 << 20
"""Bytes of a file."""
DEEPEST = 32
"""Levels of a value."""


def read_yaml(path: Path) -> Any:
    """The value of a file. Aliases are refused: a few hundred bytes of them can stand for more than memory holds. UsageError."""
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        """Every value stands where it is meant."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not taken")
            self.depth = getattr(self, "depth", 0) + 1
            if self.depth > DEEPEST:  # the scanner takes longer with every open bracket
                raise RecursionError
            found = super().compose_node(parent, index)
            self.depth -= 1
            return found

    try:
        return yaml.load(read_bounded(path, LARGEST).decode("utf-8"), Plain)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, and dates that are none
        what = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML: {one_line(what, 160)}", "correct it") from error

"""Names to implementations. Built-ins are lazy "module:attribute" strings, other packages add theirs through entry points."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from .errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One registered name: where it lives and a line for `moe-prism ls`."""

    target: str
    summary: str
    origin: str = "moe-prism"


def choices(name: str, legal: Iterable[str]) -> str:
    """The next step after an unknown name: the nearest legal one, and all of them."""
    names = list(legal)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choose one of: {', '.join(names)}"


class Registry(Generic[T]):
    """`get(name)` imports on first use; an unknown name is a UsageError that lists the legal ones."""

    def __init__(self, kind: str, builtin: Mapping[str, tuple[str, str]]) -> None:
        """builtin: name -> ("package.module:attribute", one-line summary). Entry points: group `moe_prism.<kind>`."""
        self.kind = kind
        self._builtin = {name: Entry(target, summary) for name, (target, summary) in builtin.items()}
        self._resolved: dict[str, T] = {}  # looking for plug-ins reads the disk, and `get` is called at every operating point

    def entries(self) -> dict[str, Entry]:
        """All names, built-ins first. A plug-in cannot replace a built-in."""
        found = dict(self._builtin)
        for point in self._plugins():
            package = point.dist.name if point.dist else "unknown"
            found.setdefault(point.name, Entry(point.value, f"plug-in {point.value}", package))
        return found

    def names(self) -> list[str]:
        return list(self.entries())

    def get(self, name: str) -> T:
        if name not in self._resolved:
            self._resolved[name] = self._resolve(name)
        return self._resolved[name]

    def _resolve(self, name: str) -> T:
        entries = self.entries()
        if name not in entries:
            raise UsageError(f"unknown {self.kind} '{name}'", choices(name, entries))
        module, _, attribute = entries[name].target.partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    def _plugins(self) -> list[EntryPoint]:
        return sorted(entry_points(group=f"moe_prism.{self.kind}"), key=lambda p: p.name)

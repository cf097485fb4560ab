"""Names to implementations. Built-ins are lazy "module:attribute" strings, other packages add theirs through entry points."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@cache
def _every() -> Any:  # of another class in Python 3.11
    """What all installed packages offer: their files are read once. What reads them knows mail headers and archives, so it is late too."""
    from importlib.metadata import entry_points as found

    return found()


def entry_points(group: str) -> Iterable[EntryPoint]:
    """What other packages offer under this name."""
    return _every().select(group=group)  # type: ignore[no-any-return]


OWN = "moe-prism"


@dataclass(frozen=True)
class Entry:
    """One registered name: where it lives and a line for `moe-prism ls`.

    paper: where it comes from; empty: our own, or the class says. acts: which part of an operating point it fills in, if it does.
    """

    target: str
    summary: str
    paper: str = ""
    origin: str = OWN
    acts: str | None = None


def choices(name: str, legal: Iterable[str]) -> str:
    """The next step after an unknown name: the nearest legal one, and all of them."""
    names = list(legal)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choose one of: {', '.join(names)}"


class Registry(Generic[T]):
    """`get(name)` imports on first use; an unknown name is a UsageError that lists the legal ones."""

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, tuple[str, str] | tuple[str, str, str] | Entry],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """builtin: name -> ("package.module:attribute", one-line summary), with a paper as third, or an Entry.

        Entry points of other packages: group `moe_prism.<kind>`.
        aliases: names of earlier versions that are still taken, and not listed.
        """
        self.kind = kind
        self.aliases = dict(aliases or {})
        self._builtin = {name: e if isinstance(e, Entry) else Entry(*e) for name, e in builtin.items()}
        self._resolved: dict[str, T] = {}  # looking for plug-ins reads the disk, and `get` is called at every operating point

    def entries(self, acts: str | None = None) -> dict[str, Entry]:
        """All names, built-ins first, or those that act so. A plug-in cannot replace a built-in; how it acts its class says."""
        found = dict(self._builtin)
        for point in self._plugins():
            package = point.dist.name if point.dist else "unknown"
            found.setdefault(point.name, Entry(point.value, f"plug-in {point.value}", origin=package))
        if acts is None:
            return found
        return {name: e for name, e in found.items() if (e.acts or getattr(self._load(e), "acts", None)) == acts}

    def names(self, acts: str | None = None) -> list[str]:
        return list(self.entries(acts))

    def own_name(self, name: str) -> str:
        """The name of today for one of an earlier version; any other as it is."""
        return self.aliases.get(name, name)

    def get(self, name: str) -> T:
        if name not in self._resolved:
            self._resolved[name] = self._resolve(self.own_name(name))
        return self._resolved[name]

    def only(self, acts: str, kind: str, package: str = "") -> View[Any]:
        """The part of this registry that acts so, called `kind` in errors; of the built-in ones, those whose file is in a package."""
        return View(self, acts, kind, package)

    def _resolve(self, name: str) -> T:
        entries = self.entries()
        if name not in entries:
            raise UsageError(f"unknown {self.kind} '{name}'", choices(name, entries))
        return self._load(entries[name])

    @staticmethod
    def _load(entry: Entry) -> T:
        module, _, attribute = entry.target.partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    def _plugins(self) -> list[EntryPoint]:
        return sorted(entry_points(group=f"moe_prism.{self.kind}"), key=lambda p: p.name)


class View(Generic[T]):
    """The names of a registry that act in one way, for those who want no others."""

    def __init__(self, registry: Registry[Any], acts: str, kind: str, package: str) -> None:
        self.registry, self.acts, self.kind, self.package = registry, acts, kind, package
        self._known: dict[str, T] = {}

    def entries(self) -> dict[str, Entry]:
        found = self.registry.entries(self.acts)
        return {name: e for name, e in found.items() if e.origin != OWN or e.target.startswith(self.package)}

    def names(self) -> list[str]:
        return list(self.entries())

    def get(self, name: str) -> T:
        """As `Registry.get`; names that act in another way are unknown here."""
        if name not in self._known:
            own = self.registry.own_name(name)
            if own not in self.entries():
                raise UsageError(f"unknown {self.kind} '{name}'", choices(name, self.names()))
            self._known[name] = self.registry.get(own)
        return self._known[name]

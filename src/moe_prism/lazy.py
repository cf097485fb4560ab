"""Names of a package that are imported when they are first asked for: what reads a list of plug-ins or a header then needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package. homes: module inside it -> its names, separated by spaces.

    A name must not be that of a module of the package: importing that module would put it in the name's place.
    """
    known = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{known[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find

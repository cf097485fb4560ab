"""The contract of an option class: a frozen, keyword-only dataclass whose fields carry their words and their range."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from ..errors import UsageError
from ..registry import choices

WrittenType = Literal["bf16", "fp16", "fp32"]
LOW_MEMORY_WORDS = "Keep one decoder layer in memory at a time; every forward reads all of them from disk again."
DTYPE_WORDS = "Type a quantized source's weights are written in. Default the one its config.json computes in, mostly bf16."


def option(default: Any, words: str, *, flag: str | None = None, **declared: Any) -> Any:
    """A field of an option class, with the words of `--help`.

    flag: its name on the command line where that is not the field's. What may be declared of a value, or of every entry of a list:
    least, most: inclusive bounds; above, below: exclusive ones. names: the registry that knows it, as "package.module:attribute";
    method: a method by name, with or without settings, or a chain of them, as (how it acts, or None; what it is called in errors); also:
    names beside those that are known.
    On the command line: short: further names; is_repeated: given once per entry; empty: text for an empty list, which is else said by
    leaving the flag out; unit: of a quantity, like ("B/s",).
    """
    metadata = {"help": words, "flag": flag, **declared}
    if isinstance(default, list):  # a list: equal to what JSON gives back
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def nested(kind: type[Options], *flags: str) -> Any:
    """A field that holds another option class, of which the command has only these flags. A flag that both have fills both."""
    return field(default_factory=kind, metadata={"flags": flags})


def flag_of(declared: Field[Any]) -> str:
    """--n-sub of the field n_sub."""
    return "--" + (declared.metadata.get("flag") or declared.name).replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all option classes."""

    def check(self) -> None:
        """Raises UsageError naming the first option that is outside its declared range, or a name that no registry has."""
        for declared in fields(self):
            value = getattr(self, declared.name)
            for each in value if isinstance(value, list | tuple) else () if value is None else (value,):
                _check(flag_of(declared), each, declared.metadata)


def check_method(value: str, acts: str | None, called: str, also: Sequence[str] = ()) -> None:
    """UsageError for a method, or a chain of them, that nobody knows. acts: how it acts, None: in any way; called: its kind in errors."""
    from ..catalogue import methods

    known = [*(methods if acts is None else methods.only(acts, called)).names(), *also]
    for name in (part.partition(":")[0] for part in value.split("+")):
        if methods.own_name(name) not in known:
            raise UsageError(f"unknown {called} '{name}'", choices(name, known))


def _check(flag: str, value: Any, declared: Mapping[str, Any]) -> None:
    if "names" in declared:
        module, _, name = declared["names"].partition(":")
        registry = getattr(importlib.import_module(module), name)
        known = [*declared.get("also", ()), *registry.names()]
        if value not in known:
            raise UsageError(f"unknown {registry.kind} '{value}'", choices(value, known))
    if "method" in declared:
        acts, called = declared["method"]
        check_method(value, acts, called, declared.get("also", ()))
    least, most = declared.get("least", -math.inf), declared.get("most", math.inf)
    above, below = declared.get("above", -math.inf), declared.get("below", math.inf)
    bounds = {"at least": least, "more than": above, "at most": most, "less than": below}
    limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    if not limits or (math.isfinite(value) and least <= value <= most and above < value < below):
        return
    verdict = "too small" if value < least and limits.startswith("at least") and " and " not in limits else "out of range"
    raise UsageError(f"{flag} {value if isinstance(value, int) else f'{value:g}'} is {verdict}", f"give {limits}")

"""From the name of a method, as a user writes it, to the method; and what is known of each for those who choose."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

from ..catalogue import methods
from ..compress.prune import Criterion
from ..elastic import Rule
from ..errors import UsageError
from ..registry import choices
from .base import Method
from .chain import JOIN, Chain
from .prune.masked import Prune
from .slots.rules import RuleMethod

PRUNE = "prune"


def method(name: str) -> Method:
    """The method of a name as `--methods` takes it: NAME or NAME:ARGUMENT of the catalogue; prune:CRITERION for a pruning criterion;
    several with + between them for a chain.
    """
    if JOIN in name:
        return Chain(name, [method(part) for part in name.split(JOIN)])
    plain, colon, argument = name.partition(":")
    text = argument if colon else None
    if plain == PRUNE:
        return Prune(name, Prune.read_argument(name, text))
    if methods.own_name(plain) not in methods.names():
        raise UsageError(f"unknown method '{plain}'", choices(plain, [*methods.names(), PRUNE]))
    found = methods.get(plain)
    if issubclass(found, Rule):
        kind: type[Method] = pkgutil.resolve_name(found.maker) if found.maker else RuleMethod
        return kind(name, kind.read_argument(name, text))
    if issubclass(found, Criterion) and found.form == "constant" and not colon:  # known by its own name
        return Prune(f"{PRUNE}:{plain}", Prune.read_argument(PRUNE, plain))
    if issubclass(found, Criterion):
        raise UsageError(f"'{plain}' is a pruning criterion", f"write {PRUNE}:{plain}")
    made: Method = found(name, found.read_argument(name, text))
    return made


@dataclass(frozen=True)
class Described:
    """A line of `moe-prism ls methods`. name: what to write after --methods."""

    name: str
    acts: str
    what: str
    needs: str
    paper: str
    served_by: str
    origin: str


def described() -> list[Described]:
    """Every method of the catalogue, in its order."""
    rows = []
    for name, entry in methods.entries().items():
        found: Any = methods.get(name)
        criterion = issubclass(found, Criterion)
        needs = ", ".join(found.needs if not issubclass(found, Rule) else ("sub-experts",) if found.needs_norms else ())
        acts = entry.acts or found.acts
        rows.append(
            Described(
                f"{PRUNE}:{name}" if criterion else name,
                acts,
                entry.summary,
                needs or "-",
                found.paper or "-",
                getattr(found, "served_by", "")
                or served_by(acts, getattr(found, "depends_on_batch", False), getattr(found, "leaves_out_neurons", False)),
                entry.origin,
            )
        )
    return rows


def served_by(acts: str, depends_on_batch: bool, leaves_out_neurons: bool = False) -> str:
    """Who runs the points of a method beside `frontier`, which measures all."""
    if acts == "weights":
        return "generate; any engine once `prune` or `compress` has written it"
    if leaves_out_neurons:
        return "generate; serve where it is named and drops slots"
    return "generate; serve where it is named" if depends_on_batch else "generate, serve, vLLM"

"""`moe-prism ls`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from ..catalogue import registry
from .output import emit, table

Kind = Literal[
    "families",
    "solvers",
    "objectives",
    "gates",
    "scorers",
    "compensators",
    "recoveries",
    "collectors",
    "policies",
    "routing-stages",
    "methods",
    "protections",
    "codecs",
    "source-formats",
    "cache-policies",
    "predictors",
    "systems",
]

COLUMNS = ("name", "acts", "what", "needs", "paper", "served_by")
SYSTEM_COLUMNS = ("number", "name", "paper", "state", "command")


def ls(kind: Kind, /, *, json: bool = False) -> None:
    """List what can be chosen.

    Parameters
    ----------
    kind: methods (of frontier --methods: rules, expert skipping, pruning criteria), families (MoE model types of the installed
        transformers), solvers, objectives, gates, scorers, compensators, recoveries, collectors, policies (scheduling), routing-stages,
        protections (of prune), source-formats (of quantized
        checkpoints), cache-policies, predictors (of experts), or systems (of the literature, and which of them work here).
    json: One JSON object on stdout.
    """
    if kind == "families":
        from ..model.families import installed_families

        families = installed_families()
        emit({"kind": kind, "entries": [{"name": f} for f in families]}, "\n".join(families), json)
        return
    if kind == "methods":
        from ..methods.find import described

        lines = [asdict(line) for line in described()]
        shown = [[line[column] for column in COLUMNS] for line in lines]
        emit({"kind": kind, "entries": lines}, table(tuple(c.replace("_", " ") for c in COLUMNS), shown), json)
        return
    if kind == "systems":
        from ..systems import SYSTEMS

        found = [asdict(system) for system in SYSTEMS]
        rows = [[system[column] for column in SYSTEM_COLUMNS] for system in found]
        emit({"kind": kind, "entries": found}, table(SYSTEM_COLUMNS, rows), json)
        return
    entries = [{"name": n, "summary": e.summary, "origin": e.origin} for n, e in registry(kind).entries().items()]
    emit({"kind": kind, "entries": entries}, table(("name", "what", "from"), [list(e.values()) for e in entries]), json)

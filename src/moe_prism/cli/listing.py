"""`moe-prism ls`."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any, Literal

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
    "cache-policies",
    "predictors",
]

REGISTRIES = {
    "solvers": ("partition", "solvers"),
    "objectives": ("partition", "objectives"),
    "gates": ("partition", "gates"),
    "scorers": ("elastic.scorers", "scorers"),
    "compensators": ("elastic.compensate", "compensators"),
    "recoveries": ("recover", "methods"),
    "collectors": ("calibrate", "collectors"),
    "policies": ("schedule", "policies"),
    "routing-stages": ("routing", "routing_stages"),
    "protections": ("compress.prune", "protections"),
    "cache-policies": ("offload", "cache_policies"),
    "predictors": ("offload", "predictors"),
}
"""kind -> (package, registry)."""
COLUMNS = ("name", "acts", "what", "needs", "paper", "served_by")


def ls(kind: Kind, /, *, json: bool = False) -> None:
    """List what can be chosen.

    Parameters
    ----------
    kind: methods (of frontier --methods: rules, expert skipping, pruning criteria), families (MoE model types of the installed
        transformers), solvers, objectives, gates, scorers, compensators, recoveries, collectors, policies (scheduling), routing-stages,
        protections (of prune), cache-policies, or predictors (of experts).
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
    entries = [{"name": n, "summary": e.summary, "origin": e.origin} for n, e in _registry(kind).entries().items()]
    emit({"kind": kind, "entries": entries}, table(("name", "what", "from"), [list(e.values()) for e in entries]), json)


def _registry(kind: str) -> Any:
    package, attribute = REGISTRIES[kind]
    return getattr(import_module(f"moe_prism.{package}"), attribute)

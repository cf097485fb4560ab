"""`moe-prism ls`."""

from __future__ import annotations

from typing import Literal

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
    "splits",
    "architectures",
    "slices",
    "protections",
    "codecs",
    "source-formats",
    "cache-policies",
    "placements",
    "choosers",
    "predictors",
    "systems",
]

COLUMNS = {
    "families": {"name": "name"},
    "methods": {name.replace("_", " "): name for name in ("name", "acts", "what", "needs", "paper", "served_by")},
    "systems": {name: name for name in ("number", "name", "paper", "state", "command")},
}
"""kind -> heading -> key of a row."""


def ls(kind: Kind, /, *, json: bool = False) -> None:
    """List what can be chosen.

    Parameters
    ----------
    kind: methods (of frontier --methods: rules, expert skipping, pruning criteria), families (MoE model types of the installed
        transformers), solvers, objectives, gates, scorers, compensators, recoveries, collectors, policies (scheduling), routing-stages,
        splits (of dense models), architectures (of train), slices (of frontier --judge), protections (of prune), source-formats
        (of quantized checkpoints), cache-policies, placements, choosers (of models, for route), predictors
        (of experts), or systems (of the literature, and which of them work here).
    json: One JSON object on stdout.
    """
    from ..jobs.listing import list_choices

    found = list_choices(kind)
    columns = COLUMNS.get(kind, {"name": "name", "what": "summary", "from": "origin"})
    rows = [[row[column] for column in columns.values()] for row in found.to_records()]
    emit(found, "\n".join(row[0] for row in rows) if kind == "families" else table(tuple(columns), rows), json)

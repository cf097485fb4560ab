"""`moe-prism ls`"""

from __future__ import annotations

from typing import Any, Literal

from .output import emit, table

Kind = Literal["families", "solvers", "rules", "scorers", "collectors", "objectives", "gates", "compensators", "recoveries"]


def ls(kind: Kind, /, *, json: bool = False) -> None:
    """List what can be chosen.

    Parameters
    ----------
    kind: families (MoE model types of the installed transformers), solvers, rules, scorers, collectors, objectives, gates,
        compensators, or recoveries.
    json: One JSON object on stdout.
    """
    if kind == "families":
        from ..model.families import installed_families

        families = installed_families()
        emit({"kind": kind, "entries": [{"name": f} for f in families]}, "\n".join(families), json)
        return
    entries = [{"name": n, "summary": e.summary, "origin": e.origin} for n, e in _registry(kind).entries().items()]
    emit({"kind": kind, "entries": entries}, table(("name", "what", "from"), [list(e.values()) for e in entries]), json)


def _registry(kind: str) -> Any:
    if kind in ("solvers", "objectives", "gates"):
        from .. import partition

        return getattr(partition, kind)
    if kind == "collectors":
        from ..calibrate import collectors

        return collectors
    if kind == "recoveries":
        from ..recover import methods

        return methods
    from .. import elastic

    return getattr(elastic, kind)

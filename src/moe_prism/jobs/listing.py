"""What can be chosen, by kind."""

from __future__ import annotations

from dataclasses import asdict

from ..catalogue import registry
from ..result import Findings
from ..systems import SYSTEMS


def list_choices(kind: str) -> Findings:
    """Names of a kind and what they are: methods, families, solvers, cache-policies ..., as `moe-prism ls --help` lists the kinds.

    Raises UsageError for a kind that there is not.

    >>> import moe_prism
    >>> [row["name"] for row in moe_prism.list_choices("gates").to_records()][:1]
    ['energy']
    """
    if kind == "families":
        from ..model.families import installed_families

        entries = [{"name": family} for family in installed_families()]
    elif kind == "methods":
        from ..methods.find import described  # this list asks the classes

        entries = [asdict(line) for line in described()]
    elif kind == "systems":
        entries = [asdict(system) for system in SYSTEMS]
    else:
        entries = [{"name": n, "summary": e.summary, "origin": e.origin} for n, e in registry(kind).entries().items()]
    return Findings({"kind": kind, "entries": entries}, "entries")

"""Whether what a policy declares in numbers is what it does."""

from __future__ import annotations

from ..base import CachePolicy
from .ranking import Ranking

TOLD = ("used", "missed", "entered", "left", "victim", "foresee", "new_sequence", "count", "worth")
"""Methods by which a policy decides."""


def ranking_of(policy: CachePolicy) -> Ranking | None:
    """What a policy declares; None where it does not, or where a class below the one that declares decides anything in another way."""
    for kind in type(policy).__mro__:
        if "ranking" in vars(kind):
            return policy.ranking()
        if any(name in vars(kind) for name in TOLD):
            return None
    return None

"""Several methods one after the other as one: `heapr:0.75+rtn:4+threshold` makes points that do all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..compress.chain import ChainChange
from ..compress.changes import Change, change_of
from ..errors import UsageError
from ..point import NamedPoint, OperatingPoint
from .base import Method, NoParameters, Subject

JOIN = "+"
ORDER = "weights", "routing", "slots"


class Chain(Method):
    """Every method is fitted on the model as those before it leave it. A point of the chain is one point of each, all combinations.

    Changes of weights come first, then at most one method of routing, then at most one of slots: that is the order in which they act.
    """

    acts = "weights"

    def __init__(self, name: str, parts: Sequence[Method]) -> None:
        super().__init__(name, NoParameters())
        self.parts = tuple(parts)
        acts = [part.acts for part in parts]
        wrong = next((act for act in acts if act not in ORDER), None)
        if wrong is not None:
            raise UsageError(f"'{name}' chains a method of {wrong}", f"chain methods of {', '.join(ORDER)}")
        if acts != sorted(acts, key=ORDER.index) or any(acts.count(act) > 1 for act in ORDER[1:]):
            raise UsageError(
                f"'{name}' chains methods in an order that no model runs",
                "write edits of weights, then one of routing, then one of slots",
            )
        self.needs = tuple(dict.fromkeys(need for part in parts for need in part.needs))  # type: ignore[misc]
        self.needs_sub_experts = any(part.needs_sub_experts for part in parts)  # type: ignore[misc]
        self.depends_on_batch = any(part.depends_on_batch for part in parts)  # type: ignore[misc]
        self.collectors = tuple(name for part in parts for name in getattr(part, "collectors", ()))

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        return [NamedPoint(name=JOIN.join(names), point=point) for names, point in self._from(0, (), OperatingPoint(), subject)]

    def _from(
        self, number: int, names: tuple[str, ...], point: OperatingPoint, subject: Subject
    ) -> list[tuple[tuple[str, ...], OperatingPoint]]:
        """Of the methods from one on, behind a point of those before it, under which the model runs already."""
        if number == len(self.parts):
            return [(names, point)]
        found = []
        for named in self.parts[number].points(subject):
            joined = _joined(point, named.point)
            if named.point.weights is None:
                found += self._from(number + 1, (*names, named.name), joined, subject)
                continue
            layers = [layer.parts.layer for layer in subject.elastic.layers]
            with change_of(named.point.weights).installed(subject.model, layers):
                under = replace(subject, cache={})  # what was measured before was measured on another model
                found += self._from(number + 1, (*names, named.name), joined, under)
        return found


def _joined(before: OperatingPoint, after: OperatingPoint) -> OperatingPoint:
    """Both; of a part that both say, the later where it is no change of weights."""
    weights = after.weights or before.weights
    if before.weights is not None and after.weights is not None:
        every: list[Change] = []
        for part in (before.weights, after.weights):
            change = change_of(part)
            every += change.parts if isinstance(change, ChainChange) else [change]
        weights = ChainChange(tuple(every)).part()
    more: dict[str, Any] = {"routing": after.routing} if after.routing else {}
    if after.slots != OperatingPoint().slots:
        more["slots"] = after.slots
    return replace(before, weights=weights, **more)

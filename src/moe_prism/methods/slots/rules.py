"""Selection rules as methods: sub-experts at every count of slots, or along a continuous dial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...catalogue import methods
from ...elastic.layer import ElasticLayer
from ...elastic.rules import rules
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint, SlotRule
from ...point.base import own_scorer, slots_unit
from ..base import Method, Subject


class RuleMethod(Method):
    """One rule of `elastic.rules` at every K up to k*N, or at as many budgets as are asked for where its dial is continuous.

    The smallest K is k (one sub-expert per chosen expert), or N - 1 if that is less, so that plain top-1 too has a point below its cost.
    """

    acts = "slots"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        plain = self.name.partition(":")[0]
        rule = rules.get(plain)
        if subject.n_sub == 1 and rule.needs_norms:
            raise UsageError(
                f"method '{self.name}' needs sub-experts, and this model has none",
                "give a folder written by `moe-prism refactor`, or other methods",
            )
        counts = range(max(1, min(subject.k, subject.n_sub - 1)), subject.slots + 1)
        points = subject.points if rule.is_continuous else None
        overhead = selection_overhead(subject.elastic.layers[0], subject.k) if points is not None else 0.0
        own = methods.own_name(plain)
        rows = [(count, slot_rule(own, count, subject.slots)) for count in grid(counts, points, overhead)]
        if not subject.elastic.layers[0].parts.gates:  # a rule made for gate scores then ranks by what is predicted
            rows = [(count, replace(rule, scorer=SlotRule.scorer)) for count, rule in rows]
        return [NamedPoint(name=f"{self.name}-{count:.4g}", point=OperatingPoint(slots=rule)) for count, rule in rows]


def slot_rule(rule: str, count: float, slots: int) -> SlotRule:
    """A rule at `count` of `slots` slots per token."""
    return SlotRule(budget=min(1.0, count / slots), rule=rule, scorer=own_scorer(rule), of=slots_unit(rule))


def grid(counts: range, points: int | None, overhead: float) -> list[float]:
    """Slot counts to measure: all, or `points` fractional ones whose costs (count + overhead, in slots) form equal ratios."""
    if points is None:
        return list(counts)
    low, high = counts[0] + overhead, counts[-1] + overhead
    # the ends are exact: a budget a rounding error below 1 would not be the full model
    inner = [low * (high / low) ** (i / (points - 1)) - overhead for i in range(1, points - 1)]
    return [float(counts[0]), *inner, float(counts[-1])]


def selection_overhead(layer: ElasticLayer, k: int) -> float:
    """What selection reads per token whatever is kept, in slots: predictors, and gate neurons of every candidate block.

    A kept slot saves its gate neurons and its compensation.
    """
    parts, scorer, extra = layer.parts, layer.scorer("ridge"), layer.compensator
    matrices = 3 if parts.layer.gate is not None else 2
    dropped = parts.gates * (matrices - 1) * parts.layer.hidden + (extra.parameters()[0] if extra else 0)
    return k * (scorer.parameters_per_expert() + parts.n_sub * dropped) / (parts.block * matrices * parts.layer.hidden - dropped)

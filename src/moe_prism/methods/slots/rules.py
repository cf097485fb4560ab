"""Selection rules as methods: sub-experts at every count of slots, or along a continuous dial."""

from __future__ import annotations

from collections.abc import Sequence

from ...elastic.rules import rules
from ...elastic.runtime import ElasticLayer, Setting
from ...errors import UsageError
from ..base import Candidate, Method, Subject


class RuleMethod(Method):
    """One rule of `elastic.rules` at every K up to k*N, or at as many budgets as are asked for where its dial is continuous.

    The smallest K is k (one sub-expert per chosen expert), or N - 1 if that is less, so that plain top-1 too has a point below its cost.
    """

    def candidates(self, subject: Subject) -> Sequence[Candidate]:
        self.refuse_argument()
        rule = rules.get(self.name)
        if subject.n_sub == 1 and rule.needs_norms:
            raise UsageError(
                f"method '{self.name}' needs sub-experts, and this model has none",
                "give a folder written by `moe-prism refactor`, or other methods",
            )
        counts = range(max(1, min(subject.k, subject.n_sub - 1)), subject.slots + 1)
        points = subject.points if rule.is_continuous else None
        overhead = selection_overhead(subject.elastic.layers[0], subject.k) if points is not None else 0.0
        return [
            Candidate(f"{self.name}-{count:.4g}", rule_setting(self.name, count, subject.slots))
            for count in grid(counts, points, overhead)
        ]


def rule_setting(rule: str, count: float, slots: int) -> Setting:
    """A rule at `count` of `slots` slots per token."""
    return Setting(min(1.0, count / slots), rule, "gates" if rule == "pattern" else "ridge")


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
    plan, scorer = layer.plan, layer.scorer("ridge")
    matrices = 3 if plan.layer.gate is not None else 2
    extra = layer.compensation(Setting())
    dropped = plan.gates * (matrices - 1) * plan.layer.hidden + (extra.parameters(0, 1) if extra else 0)
    return k * (scorer.parameters_per_expert() + plan.n_sub * dropped) / (plan.block * matrices * plan.layer.hidden - dropped)

"""From the budget that is asked for to the position of a rule's dial: once, when a point is bound, at the prices of every layer.

A rule keeps slots. A budget of bytes also pays for what choosing reads: the predictors, the gate neurons of dropped blocks, and what makes
up for them. Those come first; what is left buys slots. Shapes: T tokens; tables have a value at each of Q
positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..point import SlotBits, SlotRule
from .base import LayerParts, Rule
from .counter import at_width
from .prices import AS_IT_IS, StoredAs, prices_of, with_bits
from .rules import rules
from .rules.widths import WidthRule
from .side_tensors import POSITIONS

if TYPE_CHECKING:
    from .host import Host


@dataclass(frozen=True)
class Dial:
    """spent [Q]: the share of what is asked for that every evenly spaced position spends, rising; None: the dial is the budget itself.

    whole: slots of a token for a rule that keeps a whole number of them: the most that stay within the budget.
    """

    spent: Tensor | None = None
    whole: int | None = None

    def at(self, budget: float) -> float:
        """The position of a budget. UsageError for one below what the least position spends."""
        if self.spent is None or budget >= 1:
            return budget
        if budget < float(self.spent[0]):
            raise UsageError(
                f"budget {budget:g} is less than choosing a token's slots and keeping one reads ({float(self.spent[0]):.3f} of all bytes)",
                "give more, or a share of the slots",
            )
        return float(self.at_each(torch.tensor([budget]))[0])

    def at_each(self, budget: Tensor) -> Tensor:
        """The positions [T] of budgets [T]; what is below the least is the least."""
        if self.spent is None:
            return budget
        spent = self.spent.to(budget.device)
        asked = budget.double().clamp(float(self.spent[0]), 1.0)
        high = torch.searchsorted(spent, asked).clamp(1, len(spent) - 1)
        step = spent[high] - spent[high - 1]
        place = (high - 1 + (asked - spent[high - 1]) / step.clamp(min=1e-12)).clamp(max=len(spent) - 1) / (len(spent) - 1)
        if self.whole is not None:
            place = ((place * self.whole + 1e-6).floor().clamp(min=1) / self.whole).clamp(max=1)
        # never quite everything: only a budget of 1 is the model itself
        return torch.where(budget >= 1, 1.0, place.clamp(1e-6, 1 - 1e-6)).float()


@dataclass(frozen=True)
class Spending:
    """What one layer reads for a token, per chosen expert: fixed whatever is kept, slots for all of them, full for whole experts.

    share [Q]: of its slots that a rule keeps at every position.
    """

    fixed: float
    slots: float
    full: float
    share: Tensor


def spending(layer: Any, slots: SlotRule, rule: type[Rule], elastic: Host, stored: Sequence[StoredAs] | None = None) -> Spending:
    """Of one layer (`ElasticLayer`), from the prices of its blocks; the mean over its experts. stored: of `prices_of`, per layer."""
    k = elastic.k
    scorer = layer.scorer(slots.scorer) if rule.needs_norms else None
    extra = layer.compensator if slots.compensate else None
    own = AS_IT_IS if stored is None else stored[layer.index]
    prices = prices_of(layer.parts, scorer, extra, elastic.stored_bytes_per_weight, own)
    price = (prices if slots.bits is None else with_bits(prices, layer.parts, slots.bits)).bytes
    of_dropped = float((price["gates"] + price["dropped"]).sum(1).mean())
    blocks, bias = float(price["blocks"].sum(1).mean()), float(price["experts"].mean())
    fixed = of_dropped + sum(float(price[name].mean()) for name in ("predictors", "scaled", "experts") if name in price)
    per_token = float(price["tokens"].sum()) if "tokens" in price else 0.0
    if per_token and k is None:
        raise UsageError("the model does not say how many experts a token has", "give a budget of slots")
    least = 1 / (layer.parts.n_sub * (k or 1))
    room = blocks - of_dropped
    if slots.bits is not None:
        assert issubclass(rule, WidthRule)  # no other has bits
        share = _share_of_bits(rule, layer.parts, slots.bits, price, room, least)
    else:
        share = rule.share_kept(layer.parts).clamp(min=least if k else 0.0)
    return Spending(fixed + per_token / (k or 1), room, blocks + bias, share)


def _share_of_bits(
    rule: type[WidthRule], parts: LayerParts, bits: SlotBits, price: Mapping[str, Tensor], room: float, least: float
) -> Tensor:
    """[Q]: what kept slots take more than dropped ones, of `room`, what all slots as they are stored would; a token keeps one slot."""
    dropped = float((price["gates"] + price["dropped"]).mean())
    sizes = {0.0: 0.0} | {width: float(price[at_width(width)].mean()) - dropped for width in bits.widths}
    first = rule.least(parts, bits)
    return (rule.spent(parts, bits, sizes) * parts.n_sub / room).clamp(min=least * parts.n_sub * sizes[first] / room)


def affordable(elastic: Host, budgets: Sequence[float], slots: SlotRule | None = None) -> tuple[float, ...]:
    """Budgets of bytes for somebody who did not choose them: those below what choosing and one slot read become that.

    slots: the rule, default `threshold`.
    """
    slots = slots or SlotRule(budget=0.5)
    rule = rules.get(slots.rule)
    spent = dials(elastic, slots, rule, [spending(layer, slots, rule, elastic) for layer in elastic.layers])[0].spent
    assert spent is not None
    least = math.ceil(100 * float(spent[0])) / 100
    return tuple(dict.fromkeys(max(budget, least) for budget in budgets))


def dials(elastic: Host, slots: SlotRule, rule: type[Rule], found: Sequence[Spending]) -> list[Dial]:
    """The dial of every layer: one for all of them, but where layers have budgets of their own.

    found: `spending` of each, which is not asked for where the rule itself counts what is asked for and nobody holds it to that.
    """
    if slots.of != "bytes" and slots.control == "none":
        return [Dial()] * len(elastic.layers)
    whole = None if rule.is_continuous or elastic.k is None else elastic.k * elastic.layers[0].parts.n_sub
    of_bytes = slots.of == "bytes"

    def dial(layers: Sequence[Spending]) -> Dial:
        spent = sum((one.fixed * of_bytes + one.slots * one.share for one in layers), torch.zeros(POSITIONS, dtype=torch.float64))
        return Dial((spent / sum(one.full if of_bytes else one.slots for one in layers)).cummax(0).values, whole)

    return [dial(found)] * len(found) if slots.layers is None else [dial([one]) for one in found]

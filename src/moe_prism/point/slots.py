"""What rules of slots are made with, beside a budget: bits at which a slot may be read, and what sending a token costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..schema.points import REMAKE, BitRouterForm, SlotBitsForm, TollForm

Numbers = tuple[tuple[float, ...], ...]
"""Per MoE layer one number, or several."""


@dataclass(frozen=True, kw_only=True)
class BitRouter:
    """What a slot's error at the least width is predicted by: log error = slope . x + offset + 2 log routing weight.

    rows: per MoE layer slope and offset of every expert, [E, d + 1] as little-endian float16 in base64. levels: per MoE layer evenly spaced
    quantiles of the prediction on calibration text, falling.
    """

    rows: tuple[str, ...]
    levels: Numbers

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.levels) or any(
            len(row) < 2 or list(row) != sorted(row, reverse=True) for row in self.levels
        ):
            raise UsageError("the levels of a bit router do not fall, or are not of its layers", REMAKE)

    def __hash__(self) -> int:
        return hash(self.levels[0])  # it is looked up in every layer

    def to_json(self) -> dict[str, Any]:
        """Plain lists of text and numbers."""
        return {"rows": list(self.rows), "levels": [list(row) for row in self.levels]}

    @classmethod
    def of_form(cls, form: BitRouterForm) -> BitRouter:
        """What a checked file says."""
        return cls(rows=tuple(form.rows), levels=tuple(tuple(map(float, row)) for row in form.levels))


@dataclass(frozen=True, kw_only=True)
class SlotBits:
    """At how many bits a kept slot may be read: widths of one nested encoding, rising.

    errors: per MoE layer, for each width, the expected squared error of a slot as a share of what dropping it loses; of `d2moe`, as a
    share of the error at the least width. group: weights that share a scale. choosing: the width at which gate neurons are read to choose
    slots. router: what `d2moe` chooses by.
    """

    widths: tuple[float, ...]
    errors: Numbers
    group: int
    choosing: float
    router: BitRouter | None = None

    def __post_init__(self) -> None:
        if self.router is not None and len(self.router.rows) != len(self.errors):
            raise UsageError("the bit router is of a model with other layers", REMAKE)
        if not self.widths or sorted(set(self.widths)) != list(self.widths):
            raise UsageError(f"widths {list(self.widths)} of slots do not rise", "give such as 2, 3, 4, 8")
        if self.choosing not in self.widths:
            raise UsageError(f"slots are chosen at {self.choosing:g} bits, which are not stored", "give one of the widths")
        if any(len(row) != len(self.widths) for row in self.errors):
            raise UsageError("the errors of slots are not those of their widths", REMAKE)

    def to_json(self) -> dict[str, Any]:
        errors = [list(row) for row in self.errors]
        found = {"widths": list(self.widths), "errors": errors, "group": self.group, "choosing": self.choosing}
        return found if self.router is None else found | {"router": self.router.to_json()}

    @classmethod
    def of_form(cls, form: SlotBitsForm) -> SlotBits:
        """What a checked file says."""
        errors = tuple(tuple(map(float, row)) for row in form.errors)
        router = None if form.router is None else BitRouter.of_form(form.router)
        return cls(
            widths=tuple(map(float, form.widths)), errors=errors, group=form.group, choosing=float(form.choosing), router=router
        )


@dataclass(frozen=True, kw_only=True)
class Toll:
    """What it costs to send a token somewhere, by the rule `first-slot`. price: in slots at the cutoff. devices: expert e of E is on device
    e x devices // E, as engines deal them out, and a token is sent to each device once; 0: every expert is on one of its own.
    """

    price: float
    devices: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.price < math.inf:  # also refuses nan
            raise UsageError(f"a toll of {self.price:g} slots", "give a number of at least 0")
        if self.devices < 0:
            raise UsageError(f"a toll on {self.devices} devices", "give their number, or 0 for one per expert")

    def to_json(self) -> dict[str, Any]:
        return {"price": self.price, "devices": self.devices}

    @classmethod
    def of_form(cls, form: TollForm) -> Toll:
        """What a checked file says."""
        return cls(price=float(form.price), devices=form.devices)

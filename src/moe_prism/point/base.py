"""`OperatingPoint` and its four parts, with their JSON form.

A part says *when* it acts: `weights` once per checkpoint, `routing` and `slots` for every token, `decoding` once per request. A part that
is left out is neutral, and neutral is exact: `OperatingPoint()` is the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import UsageError
from ..schema import check
from ..schema.points import REMAKE, DecodingForm, PointForm, SlotsForm, StageForm, WeightsForm
from .slots import Numbers, SlotBits, Toll

SCHEMA = 1
UNITS = ("bytes", "slots", "value")
"""What a budget may be a share of."""
OF_WIDTHS = ("bits", "d2moe")
"""Rules that give each slot a width; what they need to know for that stands in the point."""
CONTROLS = ("mean", "strict", "none")
"""Who a budget may be held for."""


def own_unit(rule: str) -> str:
    """What a rule's budget is a share of unless it is said: dials that are fine enough for it count bytes, others slots."""
    return "bytes" if rule in ("threshold", *OF_WIDTHS) else slots_unit(rule)


def slots_unit(rule: str) -> str:
    """What a rule itself counts: slots, but for `mass`, which covers a share of their value."""
    return "value" if rule == "mass" else "slots"


def own_control(rule: str) -> str:
    """Who a rule's budget is held for unless it is said: every request by `threshold`; the others give each token the same."""
    return "mean" if rule == "threshold" else "none"


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """A change of the weights. change: its name in `compress.weight_changes`; settings: plain JSON values that it understands."""

    change: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"change": self.change, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, data: object) -> WeightChange:
        """The inverse of `to_json`. CorruptError names what is wrong."""
        return cls.of_form(check(WeightsForm, data, "weights", REMAKE))

    @classmethod
    def of_form(cls, form: WeightsForm) -> WeightChange:
        """What a checked file says."""
        return cls(change=form.change, settings=form.settings)


@dataclass(frozen=True, kw_only=True)
class RoutingStage:
    """One stage of routing: which of the router's experts a token computes, and with which weights.

    stage: its name in `routing.routing_stages`. layers: at most so many experts per token in every MoE layer, in model order, each at
    least 1; the model's k limits nothing. parameters: the stage's own, per layer. keep_mass: whether what is left of a token's routing
    weights is scaled up to their full sum; None: as the model's router does it (normalised routers scale, others do not).
    """

    layers: tuple[int, ...]
    stage: str = "top-n"
    parameters: Mapping[str, Numbers] = field(default_factory=dict)
    keep_mass: bool | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("a routing stage has no layers", "give a number of experts for every MoE layer")
        for layer, n in enumerate(self.layers):
            if n < 1:
                raise UsageError(f"layer {layer} of a routing stage keeps {n} experts", "every layer keeps at least 1")
        for name, rows in self.parameters.items():
            if len(rows) != len(self.layers):
                raise UsageError(f"'{name}' of a routing stage has {len(rows)} layers, not {len(self.layers)}", REMAKE)

    def check(self, layers: int, k: int | None) -> None:
        """UsageError where it is for a model with another number of MoE layers or fewer experts per token; k None: not known."""
        if len(self.layers) != layers:
            raise UsageError(
                f"the routing stage has {len(self.layers)} MoE layers, the model {layers}", "make one for this model"
            )
        for layer, n in enumerate(self.layers):
            if k is not None and n > k:
                raise UsageError(
                    f"layer {layer} of the routing stage keeps {n} experts, a token of the model has {k}", f"give 1 to {k}"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "stage": self.stage,
            "layers": list(self.layers),
            "parameters": {name: [list(row) for row in rows] for name, rows in self.parameters.items()},
            "keep_mass": self.keep_mass,
        }

    @classmethod
    def from_json(cls, data: object) -> RoutingStage:
        """The inverse of `to_json`. CorruptError names what is wrong."""
        return cls.of_form(check(StageForm, data, "routing stage", REMAKE))

    @classmethod
    def of_form(cls, form: StageForm) -> RoutingStage:
        """What a checked file says."""
        parameters = {name: tuple(tuple(map(float, row)) for row in rows) for name, rows in form.parameters.items()}
        return cls(stage=form.stage, layers=tuple(form.layers), parameters=parameters, keep_mass=form.keep_mass)


@dataclass(frozen=True, kw_only=True)
class SlotRule:
    """Which slots of the routed experts are kept.

    budget: a share of what a token has, (0, 1]; 1 keeps all. of: of its `bytes` (all that are read for it: kept slots, selection,
    compensation), of its `slots`, or of their `value`; default `own_unit`. control: who the budget is held for: the `mean` of every
    request's tokens, every token (`strict`), or nobody (`none`: the rule alone decides); default `own_control`. rule, scorer: names of
    `elastic.rules` and `elastic.scorers`. compensate: make up for what is dropped, where the artefact was written with `--compensate`.
    layers: a budget for every MoE layer, instead of `budget`. bits: how slots may be read by the rule `bits`. toll: of the rule
    `first-slot`; None: its own.
    """

    budget: float = 1.0
    rule: str = "threshold"
    scorer: str = "ridge"
    compensate: bool = True
    layers: tuple[float, ...] | None = None
    of: str = ""
    control: str = ""
    bits: SlotBits | None = None
    toll: Toll | None = None

    def __post_init__(self) -> None:
        for budget in (self.budget, *(self.layers or ())):
            if not 0 < budget <= 1:  # also refuses nan
                raise UsageError(f"budget {budget:g} is outside (0, 1]", "1 keeps every slot, 0.5 half of the bytes")
        object.__setattr__(self, "of", self.of or own_unit(self.rule))
        object.__setattr__(self, "control", self.control or own_control(self.rule))
        for name, legal in (("of", UNITS), ("control", CONTROLS)):
            if getattr(self, name) not in legal:
                raise UsageError(f"'{name}' of slots is '{getattr(self, name)}'", f"choose one of: {', '.join(legal)}")

        if self.bits is not None and self.rule not in OF_WIDTHS:
            raise UsageError(f"rule '{self.rule}' knows no bits of slots", f"use one of: {', '.join(OF_WIDTHS)}")
        if self.bits is None and self.rule in OF_WIDTHS and not self.is_full:
            raise UsageError(
                f"the rule '{self.rule}' needs to know what each width loses",
                f"measure points with `frontier --methods {self.rule}` and use one",
            )
        if self.bits is not None and (self.bits.router is not None) != (self.rule == "d2moe"):
            raise UsageError(f"the bits of the slots are of another rule than '{self.rule}'", REMAKE)
        if self.toll is not None and self.rule != "first-slot":
            raise UsageError(f"rule '{self.rule}' knows no toll", "use first-slot")

    @property
    def settings(self) -> SlotBits | Toll | None:
        """What the rule is made with beside the layer."""
        return self.bits or self.toll

    @property
    def is_full(self) -> bool:
        """Whether every slot is kept, whatever the rule."""
        return all(budget >= 1 for budget in (self.layers or (self.budget,)))

    def at(self, layer: int) -> float:
        """The budget of one layer."""
        return self.budget if self.layers is None else self.layers[layer]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and names."""
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "layers": None if self.layers is None else list(self.layers),
            "bits": self.bits and self.bits.to_json(),
        }
        found.pop("toll")
        return found if self.toll is None else found | {"toll": self.toll.to_json()}

    @classmethod
    def from_json(cls, data: object) -> SlotRule:
        """The inverse of `to_json`. CorruptError names what is wrong."""
        return cls.of_form(check(SlotsForm, data, "slots", REMAKE))

    @classmethod
    def of_form(cls, form: SlotsForm) -> SlotRule:
        """What a checked file says."""
        return cls(
            budget=float(form.budget),
            rule=form.rule,
            scorer=form.scorer,
            compensate=form.compensate,
            layers=None if form.layers is None else tuple(map(float, form.layers)),
            of=form.of or slots_unit(form.rule),  # a file from before there was a choice means this
            control=form.control,
            bits=None if form.bits is None else SlotBits.of_form(form.bits),
            toll=None if form.toll is None else Toll.of_form(form.toll),
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token follows from one or several forwards. method: its name; settings: plain JSON values that it understands."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, data: object) -> Decoding:
        """The inverse of `to_json`. CorruptError names what is wrong."""
        return cls.of_form(check(DecodingForm, data, "decoding", REMAKE))

    @classmethod
    def of_form(cls, form: DecodingForm) -> Decoding:
        """What a checked file says."""
        return cls(method=form.method, settings=form.settings)


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """How a model runs: the one thing that is measured, chosen, served and written down.

    >>> import moe_prism
    >>> half = moe_prism.OperatingPoint().with_budget(0.5, None)
    >>> half.slots.rule, moe_prism.OperatingPoint.from_json(half.to_json()) == half
    ('threshold', True)
    """

    weights: WeightChange | None = None
    routing: tuple[RoutingStage, ...] = ()
    slots: SlotRule = SlotRule()
    decoding: Decoding | None = None

    @property
    def is_per_token(self) -> bool:
        """Whether every part acts per token, so that points like it may share a batch."""
        return self.weights is None and self.decoding is None

    @property
    def is_full(self) -> bool:
        """Whether no part does anything. A stage that happens to keep everything still counts as one."""
        return self.is_per_token and not self.routing and self.slots.is_full

    def with_budget(self, budget: float, rule: str | None = None, control: str = "") -> OperatingPoint:
        """The same at another budget, and by another rule if one is given: of the rule's own unit, and held as the rule does."""
        slots = replace(self.slots, budget=budget, layers=None, of="", control="none")
        slots = slots if rule is None else replace(slots, rule=rule, scorer=own_scorer(rule), of="", bits=None, toll=None)
        return replace(self, slots=replace(slots, control=control))

    def with_slots(self, share: float, rule: str | None = None) -> OperatingPoint:
        """The same at a share of the slots, held for nobody: what is fitted or profiled with, on text like the calibration's."""
        point = self.with_budget(share, rule, "none")
        return replace(point, slots=replace(point.slots, of=slots_unit(point.slots.rule)))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, with the version of this form."""
        return {
            "schema": SCHEMA,
            "weights": self.weights and self.weights.to_json(),
            "routing": [stage.to_json() for stage in self.routing],
            "slots": self.slots.to_json(),
            "decoding": self.decoding and self.decoding.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> OperatingPoint:
        """The inverse of `to_json`. CorruptError names what is wrong; a version from the future is refused."""
        return cls.of_form(check(PointForm, data, "operating point", REMAKE))

    @classmethod
    def of_form(cls, form: PointForm) -> OperatingPoint:
        """What a checked file says."""
        return cls(
            weights=None if form.weights is None else WeightChange.of_form(form.weights),
            routing=tuple(map(RoutingStage.of_form, form.routing)),
            slots=SlotRule() if form.slots is None else SlotRule.of_form(form.slots),
            decoding=None if form.decoding is None else Decoding.of_form(form.decoding),
        )


def own_scorer(rule: str) -> str:
    """The scorer that a rule was made for: the paper's gate scores for the paper's rule, else the default."""
    return "gates" if rule == "pattern" else SlotRule.scorer


FULL = OperatingPoint()
"""The model itself."""

"""EAQuant: inputs of experts are evened out before weights are rounded (arXiv 2506.13329)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.smooth import aligned_clip, exponents, factors, with_floor
from ...compress.quantize.smoothed import SmoothChange
from ...errors import UsageError
from ...model.norm_readers import NormReaders, norm_readers
from ...model.scores import router_weight
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from ..statistics import statistics_of

WIDTHS = 4.0, 3.0, 2.0
ROUTER_WIDTHS = 2, 8
MOST_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class EaQuantParameters:
    """bits: of all experts, 0: each of WIDTHS. alpha: how much of the inputs' range goes to the weights, 0 to 1. floor: share of the mean
    number of tokens that every expert is judged by at least. router: bits of the router, whose bytes are not counted among those of
    experts; 0: it stays. steps: per doubling of a factor; 1 is exact in any type of weight. group: inputs that share a scale.
    """

    bits: float = 0
    alpha: float = 0.6
    floor: float = 2.0
    router: int = 0
    steps: int = 1
    group: int = 32


class EaQuant(Method):
    """`eaquant:4`, or `eaquant:bits=4:alpha=0.5`. One vector per layer, then rounding to nearest."""

    acts = "weights"
    needs = ("how often each expert is chosen", "a sample of its inputs")
    paper = "arXiv 2506.13329"
    Parameters = EaQuantParameters
    parameters: EaQuantParameters

    @classmethod
    def example(cls) -> str | None:
        return "4"

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> EaQuantParameters:
        found: EaQuantParameters = super().read_argument(name, text)
        low, high = ROUTER_WIDTHS
        if not 0 <= found.alpha <= 1:
            raise UsageError(f"alpha={found.alpha:g} of '{name}' is outside 0 to 1", "write alpha=0.6")
        if found.router and not low <= found.router <= high:
            raise UsageError(
                f"router={found.router} of '{name}' is outside {low} to {high} bits", "write router=8, or leave it out"
            )
        if not 1 <= found.steps <= MOST_STEPS:
            raise UsageError(f"steps={found.steps} of '{name}' is outside 1 to {MOST_STEPS}", "write steps=1, or leave it out")
        for bits in (found.bits,) if found.bits else ():
            Rtn().check(bits, found.group)
        return found

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        change = smoothing(subject, replace(asked, bits=asked.bits or WIDTHS[0]))
        found = []
        for bits in (asked.bits,) if asked.bits else WIDTHS:
            own = replace(change, stored=QuantizeChange(Rtn(), bits, asked.group))
            found.append(NamedPoint(name=self._name(bits), point=OperatingPoint(weights=own.part())))
        return found

    def _name(self, bits: float) -> str:
        """eaquant-4, or with what was set beside the bits eaquant-4-alpha-0.5."""
        asked, default = self.parameters, EaQuantParameters()
        names = [
            name for name in ("alpha", "floor", "router", "steps", "group") if getattr(asked, name) != getattr(default, name)
        ]
        return "-".join([f"eaquant-{bits:g}", *(f"{name}-{getattr(asked, name):g}" for name in names)])


def smoothing(subject: Subject, asked: EaQuantParameters) -> SmoothChange:
    """What is folded into this model's layers before they are stored."""
    gathered = statistics_of(subject, ("counts", "tokens")).layers
    readers = norm_readers(subject.model, [layer.parts.layer for layer in subject.elastic.layers])
    samples = [
        [x for x, _ in with_floor(subject.model, own.layer, statistics, asked.floor, subject.k)]
        for own, statistics in zip(readers, gathered, strict=True)
    ]
    return smoothed(readers, samples, asked, subject.k)


def smoothed(
    readers: Sequence[NormReaders], samples: Sequence[Sequence[Tensor]], asked: EaQuantParameters, k: int
) -> SmoothChange:
    """The same from inputs [S, d] of every layer's experts. k: experts per token."""
    vectors, clips = [], []
    for own, inputs in zip(readers, samples, strict=True):
        weight = router_weight(own.model, own.layer).float().cpu() if asked.router else None
        found = exponents(own.layer, inputs, asked.alpha, asked.steps, weight)
        vectors.append(tuple(found.tolist()))
        if weight is not None:
            s = factors(found, asked.steps)
            clips.append(aligned_clip(weight * s, torch.cat(list(inputs)) / s, asked.router, k))
    return SmoothChange(QuantizeChange(Rtn(), asked.bits, asked.group), tuple(vectors), asked.steps, asked.router, tuple(clips))

"""QuantMoE-Bench's rules (arXiv 2406.08155): the favoured experts get 4 bits, all others 2.

Its rules on attention and on shared experts are of weights that stay as they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.decoded import matrices
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint
from ...registry import choices
from ..base import Method, Subject
from ..statistics import statistics_of

AVERAGES = 3.5, 3.0, 2.5
LOW, HIGH = 2.0, 4.0
Scores = list[Tensor]
"""Of every layer [E]: what is larger is stored in more bits."""


def frequency(subject: Subject) -> Scores:
    """The sum of an expert's routing weights, as a share of its layer's."""
    found = [own.values["counts"]["weight_sum"] for own in statistics_of(subject, ("counts", "tokens")).layers]
    return [weight / weight.sum().clamp(min=1e-30) for weight in found]


def first_layers(subject: Subject) -> Scores:
    """Early layers before late ones."""
    return [torch.full((layer.parts.layer.num_experts,), -float(i)).double() for i, layer in enumerate(subject.elastic.layers)]


def outliers(subject: Subject) -> Scores:
    """The largest ratio of an input's largest weight to its mean one, of the worst matrix of an expert. Reads no text."""
    found = []
    for layer in subject.elastic.layers:
        sizes = [matrix.float().abs() for matrix in matrices(layer.parts.layer)]
        ratios = [(size.amax(1) / size.mean(1).clamp(min=1e-30)).amax(1) for size in sizes]
        found.append(torch.stack(ratios).amax(0).double())
    return found


def turning_layers(subject: Subject) -> Scores:
    """Layers that turn the residual stream most: its score of a block, measured and not predicted. UsageError where it is not seen."""
    found = []
    for own, layer in zip(statistics_of(subject, ("rotation",)).layers, subject.elastic.layers, strict=True):
        values, parts = own.values["rotation"], layer.parts.layer
        if not int(values["tokens"]):
            raise UsageError(f"the residual stream of '{parts.name}' was not seen", "use quantmoe:rule=frequency")
        found.append((values["turned"] / values["tokens"]).expand(parts.num_experts))
    return found


RULES: Mapping[str, Callable[[Subject], Scores]] = {
    "frequency": frequency,
    "first": first_layers,
    "outliers": outliers,
    "turns": turning_layers,
}
BY_LAYER = ("frequency",)
"""Rules whose scores of different layers are not compared: each layer has its own favoured experts."""


@dataclass(frozen=True, kw_only=True)
class QuantMoeParameters:
    """rule: a name of RULES; bits: mean width of the routed experts, 0: each of AVERAGES; group: inputs that share a scale."""

    rule: str = "frequency"
    bits: float = 0
    group: int = 32


class QuantMoe(Method):
    """`quantmoe:frequency`, `quantmoe:rule=first:bits=3`."""

    acts = "weights"
    needs = ("routing weights, or the residual stream, by the rule",)
    paper = "arXiv 2406.08155"
    Parameters = QuantMoeParameters
    parameters: QuantMoeParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> QuantMoeParameters:
        found: QuantMoeParameters = super().read_argument(name, text)
        if found.rule not in RULES:
            raise UsageError(f"'{name}' has no rule '{found.rule}'", f"write rule=NAME, with {choices(found.rule, RULES)}")
        if found.bits and not LOW <= found.bits <= HIGH:
            raise UsageError(f"{found.bits:g} bits are outside {LOW:g} to {HIGH:g}", "write bits=3")
        return found

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        scores = RULES[asked.rule](subject)
        return [
            NamedPoint(
                name=f"quantmoe-{asked.rule}-{mean:g}", point=two_widths(scores, mean, asked.group, asked.rule in BY_LAYER)
            )
            for mean in ((asked.bits,) if asked.bits else AVERAGES)
        ]


def two_widths(scores: Scores, mean: float, group: int, by_layer: bool) -> OperatingPoint:
    """HIGH bits for the experts with the largest scores, of each layer or of all, LOW for the rest; ties go to lower ids."""
    share = (mean - LOW) / (HIGH - LOW)
    marks = (
        [_largest(own, share) for own in scores]
        if by_layer
        else torch.split(_largest(torch.cat(scores), share), list(map(len, scores)))
    )
    widths = tuple(tuple(HIGH if favoured else LOW for favoured in own.tolist()) for own in marks)
    return OperatingPoint(weights=QuantizeChange(Rtn(), widths, group).part())


def _largest(scores: Tensor, share: float) -> Tensor:
    marks = torch.zeros(len(scores), dtype=torch.bool)
    marks[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = True
    return marks

"""What methods share that remove neurons: they rank them, and one place decides and cuts. Shapes: E experts, f neurons, d hidden."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from ...compress.slice.change import SliceChange
from ...compress.slice.choose import SliceRequest, choose_neurons
from ...errors import UsageError
from ...model import MoELayer
from ...options.compress import NeuronScope
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject, check_kept
from ..statistics import statistics_of

KEEPS = 0.9, 0.75, 0.5
OWN = "own"
FLOOR = 64
"""Tokens below which what an expert's own say is filled up with its layer's mean."""


@dataclass(frozen=True, kw_only=True)
class NeuronParameters:
    """keep: share of the neurons that stays, 0: .9, .75 and .5. scope: which neurons are ranked together, those of the `model`, of a
    `layer`, or of an `expert`, so that all are equally wide; `own`: as published. multiple: widths of experts are multiples of it.
    """

    keep: float = 0
    scope: str = OWN
    multiple: int = 1


@dataclass(frozen=True)
class LayerSeen:
    """A layer with its weights, and what calibration says of it: collector -> statistic -> tensor."""

    layer: MoELayer
    values: Mapping[str, Mapping[str, Tensor]]

    def of(self, collector: str) -> Mapping[str, Tensor]:
        """The statistics of one collector. UsageError if the pass did not run it."""
        if collector not in self.values:
            raise UsageError(
                f"the calibration holds no '{collector}'",
                f"calibrate with --collectors ...,{collector}, or leave --calibration out",
            )
        return self.values[collector]

    def mean(self, collector: str, name: str) -> Tensor:
        """[E, f] (float64): a sum over routed tokens divided by their number.

        An expert with fewer than FLOOR tokens gets the mean of all routed tokens of the layer for those that it lacks: what few tokens say
        is noise, and what none say is not that nothing is lost.
        """
        found = self.of(collector)
        total, count = found[name].double(), found["count"].double()[:, None]
        lacking = (FLOOR - count).clamp(min=0)
        return (total + lacking * total.sum(0) / count.sum().clamp(min=1)) / count.clamp(min=FLOOR)


class NeuronMethod(Method):
    """`NAME:0.75`, or `NAME:keep=0.75:scope=layer:multiple=16`; without a share a point for each of KEEPS.

    Every slot stays, and becomes cheaper by what its experts lost: bytes that are read, those in memory, and FLOPs.
    """

    acts: ClassVar[str] = "weights"
    collectors: ClassVar[tuple[str, ...]] = ()
    """What it reads of a calibration."""
    scope: ClassVar[NeuronScope] = "layer"
    """Its own, as published."""
    Parameters: ClassVar[type[Any]] = NeuronParameters
    parameters: NeuronParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> Any:
        found = super().read_argument(name, text)
        if found.scope not in (OWN, *get_args(NeuronScope)):
            raise UsageError(f"'{name}' has no scope '{found.scope}'", f"choose one of: {', '.join(get_args(NeuronScope))}")
        check_kept(name, found.keep)
        return found

    @classmethod
    def example(cls) -> str | None:
        return "0.75"

    @abstractmethod
    def scores(self, seen: LayerSeen) -> Tensor:
        """[E, f] (float64): what is lost without each neuron. Scores of different layers are compared as they are."""

    def evidence(self, seen: LayerSeen) -> float:
        """A number of a layer that `shares` reads."""
        return 0.0

    def shares(self, evidence: Sequence[float], keep: float) -> tuple[float, ...] | None:
        """How much of every layer stays, for methods that say so; None: by the ranking."""
        return None

    @torch.no_grad()
    def judge(self, seen: LayerSeen) -> tuple[Tensor, float]:
        """Scores and evidence of a layer, whose weights may leave afterwards."""
        return self.scores(seen), self.evidence(seen)

    def request(self, keep: float, evidence: Sequence[float]) -> SliceRequest:
        """The budget as the parameters say it."""
        asked = self.parameters
        scope: Any = self.scope if asked.scope == OWN else asked.scope
        shares = self.shares(evidence, keep) if scope == "layer" else None
        return SliceRequest(keep, scope, asked.multiple, shares)

    def change(self, judged: Sequence[tuple[Tensor, float]], keep: float, protected: Sequence[Tensor]) -> SliceChange:
        """What stays, by what `judge` says of every layer. protected [E, f] (bool) per layer."""
        request = self.request(keep, [evidence for _, evidence in judged])
        return SliceChange.of(choose_neurons([scores for scores, _ in judged], request, protected))

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        layers, asked = [layer.parts.layer for layer in subject.elastic.layers], self.parameters
        gathered: Sequence[Mapping[str, Any]] = [{} for _ in layers]
        if self.collectors:
            gathered = [own.values for own in statistics_of(subject, self.collectors).layers]
        judged = [self.judge(LayerSeen(layer, own)) for layer, own in zip(layers, gathered, strict=True)]
        gates = [gate_neurons(layer.parts) for layer in subject.elastic.layers]
        found: dict[SliceChange, NamedPoint] = {}  # narrow experts: shares may round to the same neurons
        for keep in (asked.keep,) if asked.keep else KEEPS:
            change = self.change(judged, keep, gates)
            found.setdefault(change, NamedPoint(name=self._name(keep), point=OperatingPoint(weights=change.part())))
        return list(found.values())

    def _name(self, keep: float) -> str:
        """heapr-0.75, with what was set beside the share."""
        default = asdict(type(self.parameters)())
        more = [f"{name}-{value}" for name, value in asdict(self.parameters).items() if name != "keep" and value != default[name]]
        return "-".join([self.name.partition(":")[0], f"{keep:g}", *more])


def gate_neurons(parts: Any) -> Tensor:
    """[E, f] (bool): neurons that slots are chosen by, which stay."""
    found = torch.zeros(parts.layer.num_experts, parts.layer.width, dtype=torch.bool)
    found[:, parts.gate_ids().flatten().cpu()] = parts.n_sub > 1
    return found

"""What methods share that put other weights in the places of experts: who joins whom is said by statistics, the rest layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...calibrate.run import Settings
from ...compress.edit import Edit
from ...elastic.runtime import experts_per_token
from ...errors import UsageError
from ...model import MoELayer
from ...model.router import Router, RoutingGroups
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject, check_kept
from ..statistics import statistics_of

KEEPS = 0.75, 0.5


@dataclass(frozen=True, kw_only=True)
class MergeParameters:
    """keep: share of the experts, 0: .75 and .5."""

    keep: float = 0


class RoutedLayer(NamedTuple):
    """A layer, whose weights need not be in memory: what calibration says of it, and its router."""

    layer: MoELayer
    values: Mapping[str, Mapping[str, Tensor]]
    per_token: int
    groups: RoutingGroups | None

    def of(self, collector: str) -> Mapping[str, Tensor]:
        """The statistics of one collector. UsageError if the pass did not run it."""
        if collector not in self.values:
            raise UsageError(
                f"the calibration holds no '{collector}'",
                f"calibrate with --collectors ...,{collector}, or leave --calibration out",
            )
        return self.values[collector]


def routed_layers(model: Any, layers: Sequence[MoELayer], values: Sequence[Mapping[str, Any]]) -> list[RoutedLayer]:
    """Every layer of a model. UsageError where no router chooses."""
    found = []
    for layer, own in zip(layers, values, strict=True):
        router = Router(model, layer)
        if refusal := router.refusal():
            raise UsageError(refusal, "give a model with experts that a router chooses")
        found.append(RoutedLayer(layer, own, experts_per_token(model, layer), router.groups))
    return found


class MergeMethod(Method):
    """`NAME:0.5`; without a share a point for each of KEEPS."""

    acts: ClassVar[str] = "weights"
    Parameters: ClassVar[type[Any]] = MergeParameters
    parameters: MergeParameters
    removes: ClassVar[bool] = False
    """Whether experts go, so that a checkpoint has fewer; else several share one set of weights, which no checkpoint can say."""
    capacity: ClassVar[int] = Settings.capacity
    """Tokens of a sample, where it reads one."""

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> Any:
        found = super().read_argument(name, text)
        check_kept(name, found.keep)
        return found

    @classmethod
    def example(cls) -> str | None:
        return "0.5"

    @property
    @abstractmethod
    def collectors(self) -> tuple[str, ...]:
        """What it reads of a calibration."""

    def experts_share(self, keep: float) -> float:
        """The share of the experts that stays, where experts go."""
        return keep

    def check(self, layers: Sequence[RoutedLayer], keep: float) -> None:
        """UsageError for a share that these layers cannot have, before anything is measured."""

    @abstractmethod
    def plans(self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor]) -> Sequence[Any]:
        """Of every layer who stays and who joins whom, without a look at the weights. protected [E] (bool): experts that stay as they are.

        UsageError for a share that cannot be met.
        """

    @abstractmethod
    def settled(self, plan: Any, layer: RoutedLayer) -> Any:
        """What the edit says of a layer, which is in memory."""

    @abstractmethod
    def edit(self, settled: Sequence[Any]) -> Edit:
        """The change, from what `settled` says of every layer."""

    def change(self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor] = ()) -> Edit:
        """Of a model in memory."""
        shields = protected or [torch.zeros(own.layer.num_experts, dtype=torch.bool) for own in layers]
        plans = self.plans(layers, keep, shields)
        return self.edit([self.settled(plan, own) for plan, own in zip(plans, layers, strict=True)])

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        every = [layer.parts.layer for layer in subject.elastic.layers]
        gathered: Sequence[Mapping[str, Any]] = [{} for _ in every]
        if self.collectors:
            gathered = [own.values for own in statistics_of(subject, self.collectors, self.capacity).layers]
        layers = routed_layers(subject.model, every, gathered)
        shares = (self.parameters.keep,) if self.parameters.keep else KEEPS
        return [
            NamedPoint(name=self.point_name(keep), point=OperatingPoint(weights=self.change(layers, keep).part()))
            for keep in shares
        ]

    def point_name(self, keep: float) -> str:
        """dern-0.5, with what was set beside the share."""
        default = asdict(type(self.parameters)())
        more = [f"{name}-{value}" for name, value in asdict(self.parameters).items() if name != "keep" and value != default[name]]
        return "-".join([self.name.partition(":")[0], f"{keep:g}", *more])

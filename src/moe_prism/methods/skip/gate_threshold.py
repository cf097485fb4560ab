"""Intra-expert sparsity (arXiv 2605.08575): an expert's gate projection is computed, and up and down only where the gate is large.

A neuron of a chosen expert is skipped where |act(gate x)| is below the layer's cutoff, a quantile over calibration text. The router, the
experts it chooses and their order stay. Of three matrices the gate is always read, so a third of the bytes stays too. A mean of m of k
experts stands for the share m / k of an expert's bytes. The savings are counted; what computes here multiplies whole experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...elastic.execute.above import gate_sizes
from ...elastic.observe import View
from ...errors import UsageError
from ...model.base import is_expert
from ...point import RoutingStage
from ...routing.base import Routed, Stage, VariantIndex
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, calibration_facts, given
from .profile import views

EVERY = 16  # tokens of the calibration text to one whose gates are looked at
FLOOR = 1 / 3  # of the bytes: the gate's matrix


class GateThresholdStage(Stage):
    """Sets the layer's `cutoff` for every token; 0: nothing is skipped."""

    paper = "arXiv 2605.08575"
    neutral_values: ClassVar[Mapping[str, float]] = {"cutoff": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"neurons"})

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        own = self.column("cutoff").at(routed.layer, which, routed.x.device)[..., 0].expand(len(routed.x))
        return replace(routed, cutoff=own if routed.cutoff is None else torch.maximum(own, routed.cutoff))


class GateThreshold(SkipMethod):
    """The same share of the neurons of every layer, by the size of their gates."""

    needs = ("calibration text",)
    paper = "arXiv 2605.08575"
    stage: ClassVar[type[GateThresholdStage]] = GateThresholdStage
    leaves_out_neurons = True

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        share = (given(self.name, mean) / subject.k - FLOOR) / (1 - FLOOR)
        if share <= 0:
            raise UsageError(
                f"method 'gate-threshold' reads every gate, which is {subject.k * FLOOR:.3g} of {subject.k} experts",
                "give a larger mean",
            )
        cutoffs = tuple((_lower(sizes.flatten(), 1 - share),) for sizes in views(subject, "gate sizes", _sizes(subject)))
        stage = RoutingStage(layers=all_experts(subject), stage="gate-threshold", parameters={"cutoff": cutoffs})
        kept = subject.k * (FLOOR + (1 - FLOOR) * share)
        return Fitted(stage, kept, {"neurons": share, **calibration_facts(subject)})

    def means(self, subject: Subject) -> Sequence[float | None]:
        """As many as there would be down to 1, down to half of what is above the floor."""
        found = [mean for mean in super().means(subject) if mean is not None]
        low = max(1.0, subject.k * (FLOOR + (1 - FLOOR) / 8))
        return [subject.k - (subject.k - mean) * (subject.k - low) / (subject.k - 1) for mean in found]


def _sizes(subject: Subject) -> View:
    """A view: sizes [S, f] of the gates of every EVERY-th token's experts."""

    def view(routed: Routed) -> Tensor:
        layer = subject.elastic.layers[routed.layer].parts.layer
        if layer.gate is None:
            raise UsageError("method 'gate-threshold' looks at gates, and these experts have none", "take `uniform`")
        index, x = routed.index[::EVERY], routed.x[::EVERY]
        experts = torch.unique(index[is_expert(index, layer.num_experts)]).tolist()
        return torch.cat([gate_sizes(layer, e, x[torch.where(index == e)[0]])[1] for e in experts])

    return view


def _lower(values: Tensor, share: float) -> float:
    """What a share of the values is below."""
    place = min(round(share * len(values)), len(values) - 1)
    return float(values.sort().values[place])

"""Expert pruning as a change of weights, in mask mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...model.router import RoutingGroups
from ...point import read
from ..changes import Change
from .choose import KeptExperts
from .constants import Constants
from .mask import pruned

WHERE = "settings of the weight change 'prune'"


@dataclass(frozen=True)
class PruneChange(Change):
    """Every layer without some of its experts."""

    kept: tuple[KeptExperts, ...]
    name = "prune"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PruneChange:
        rows = settings.get("layers")
        if not isinstance(rows, list) or not 0 < len(rows) <= read.MOST_LAYERS:
            raise CorruptError(f"'layers' of {WHERE} must be a list", read.REMAKE)
        return cls(tuple(_layer(row) for row in rows))

    def settings(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "experts": layer.experts,
                    "kept": list(layer.kept),
                    "groups": layer.groups and asdict(layer.groups),
                    "masked": layer.masked,
                    "constants": layer.constants and layer.constants.text,
                }
                for layer in self.kept
            ]
        }

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        wanted, there = [layer.experts for layer in self.kept], [layer.num_experts for layer in layers]
        if wanted != there:
            raise UsageError(
                f"the pruned experts are of a model with {wanted} experts per layer, this one has {there}", read.REMAKE
            )
        return pruned(model, self.kept, layers)

    @property
    def resident_values(self) -> int:
        return sum(c.constants.values for c in self.kept if c.constants)

    @property
    def resident_share(self) -> float:
        """A masked layer saves nothing."""
        return sum(c.experts if c.masked else len(c.kept) for c in self.kept) / sum(c.experts for c in self.kept)


def _layer(data: object) -> KeptExperts:
    row = read.mapping(data, WHERE, ("experts", "kept", "groups", "masked", "constants"))
    experts, kept = read.get(row, "experts", WHERE), read.whole_numbers(read.get(row, "kept", WHERE), f"kept of {WHERE}")
    if (
        type(experts) is not int
        or not 0 < experts <= 1 << 20
        or len(set(kept)) != len(kept)
        or min(kept) < 0
        or max(kept) >= experts
    ):
        raise CorruptError(f"{WHERE} keep experts that there are not", read.REMAKE)
    groups = None
    if row.get("groups") is not None:
        names = ("count", "limit", "least")
        numbers = read.mapping(row["groups"], f"groups of {WHERE}", names)
        groups = RoutingGroups(*read.whole_numbers([read.get(numbers, name, WHERE) for name in names], f"groups of {WHERE}"))
    masked = read.flag(row.get("masked", False), f"masked of {WHERE}") is True
    text = row.get("constants")
    constants = None if text is None else Constants.from_text(text, experts - len(kept), WHERE)
    return KeptExperts(experts, kept, groups, masked, constants)

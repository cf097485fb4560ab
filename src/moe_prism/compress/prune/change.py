"""Expert pruning as a change of weights, in mask mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...model.router import RoutingGroups
from ...schema import check
from ...schema.points import REMAKE, KeptForm, PruneForm
from ..edit import Edit
from .choice import KeptExperts
from .constants import Constants
from .mask import pruned

WHERE = "settings of the weight change 'prune'"


@dataclass(frozen=True)
class PruneChange(Edit):
    """Every layer without some of its experts."""

    kept: tuple[KeptExperts, ...]
    name: ClassVar[str] = "prune"
    touches_weights: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PruneChange:
        return cls(tuple(kept_experts(row, WHERE) for row in check(PruneForm, settings, WHERE, REMAKE).layers))

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
        self.check_fits(layers)
        return pruned(model, self.kept, layers)

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        wanted, there = [layer.experts for layer in self.kept], [layer.num_experts for layer in layers]
        if wanted != there:
            raise UsageError(f"the pruned experts are of a model with {wanted} experts per layer, this one has {there}", REMAKE)

    def changes(self, number: int) -> bool:
        return False

    def edit(self, number: int, layer: MoELayer) -> None:
        """Weights stay; which experts there are, `staying` says."""

    @property
    def staying(self) -> tuple[KeptExperts, ...]:
        if any(own.constants for own in self.kept):
            raise UsageError("constants in the place of experts have no form beside another edit", "write them with `prune`")
        return self.kept

    def experts_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        return self.kept[layer].mask()

    @property
    def resident_values(self) -> int:
        return sum(c.constants.values for c in self.kept if c.constants)

    @property
    def resident_share(self) -> float:
        """A masked layer saves nothing."""
        return sum(c.experts if c.masked else len(c.kept) for c in self.kept) / sum(c.experts for c in self.kept)


def kept_experts(form: KeptForm, where: str) -> KeptExperts:
    """What a checked file says of one layer. CorruptError for experts that there are not, and constants that are none."""
    if len(set(form.kept)) != len(form.kept) or max(form.kept) >= form.experts:
        raise CorruptError(f"{where}: 'kept' names experts that there are not, or one twice", REMAKE)
    groups = None if form.groups is None else RoutingGroups(form.groups.count, form.groups.limit, form.groups.least)
    text = form.constants
    constants = None if text is None else Constants.from_text(text, form.experts - len(form.kept), where)
    return KeptExperts(form.experts, tuple(form.kept), groups, form.masked, constants)

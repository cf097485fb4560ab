"""Compensation for dropped slots; methods are plug-ins. An artefact holds the tensors of at most one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import on_use
from ...registry import Registry

if TYPE_CHECKING:
    from ..base import LayerParts
    from .base import Compensator, ExpertSample

__getattr__ = on_use(__name__, {"base": "Compensator ExpertSample"})

compensators: Registry[type[Compensator]] = Registry(
    "compensator",
    {
        "mean": ("moe_prism.elastic.compensate.mean:Mean", "the mean output of a dropped sub-expert, one vector each"),
        "scale": ("moe_prism.elastic.compensate.scale:Scale", "kept sub-experts scaled up for the dropped ones of their expert"),
        "low-rank": ("moe_prism.elastic.compensate.low_rank:LowRankTerm", "a rank-r linear term per dropped sub-expert"),
    },
)


def fit(name: str, parts: LayerParts, samples: list[ExpertSample], rank: int) -> Compensator:
    """Fit a method and put its side tensors into the parts."""
    from ..side_tensors import COMPENSATE

    for key, tensor in compensators.get(name).fit(parts, samples, rank).items():
        parts.tensors[f"{COMPENSATE}{name}.{key}"] = tensor.cpu()
    return compensators.get(name)(parts)


def compensator(parts: LayerParts) -> Compensator | None:
    """The method whose tensors the parts holds, if any."""
    from ..side_tensors import COMPENSATE

    name = next((key.split(".")[1] for key in parts.tensors if key.startswith(COMPENSATE)), None)
    return None if name is None else compensators.get(name)(parts)


__all__ = ["Compensator", "ExpertSample", "compensator", "compensators", "fit"]

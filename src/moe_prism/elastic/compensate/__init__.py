"""Compensation for dropped slots; methods are plug-ins. An artefact holds the tensors of at most one."""

from ...registry import Registry
from ..base import LayerParts
from .base import PREFIX, Compensator, ExpertSample

compensators: Registry[type[Compensator]] = Registry(
    "compensator",
    {
        "mean": ("moe_prism.elastic.compensate.mean:Mean", "the mean output of a dropped sub-expert, one vector each"),
        "scale": ("moe_prism.elastic.compensate.scale:Scale", "kept sub-experts scaled up for the dropped ones of their expert"),
        "low-rank": ("moe_prism.elastic.compensate.low_rank:LowRankTerm", "a rank-r linear term per dropped sub-expert"),
    },
)


def fit(name: str, plan: LayerParts, samples: list[ExpertSample], rank: int) -> Compensator:
    """Fit a method and put its side tensors into the plan."""
    for key, tensor in compensators.get(name).fit(plan, samples, rank).items():
        plan.tensors[f"{PREFIX}{name}.{key}"] = tensor.cpu()
    return compensators.get(name)(plan)


def compensator(plan: LayerParts) -> Compensator | None:
    """The method whose tensors the plan holds, if any."""
    name = next((key.split(".")[1] for key in plan.tensors if key.startswith(PREFIX)), None)
    return None if name is None else compensators.get(name)(plan)


__all__ = ["Compensator", "ExpertSample", "compensator", "compensators", "fit"]

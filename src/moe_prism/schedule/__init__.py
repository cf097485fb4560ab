"""Who runs next, and at which quality: request classes, cost model, policies, simulator. Pure: no engine, no clock."""

from __future__ import annotations

from collections.abc import Callable

from ..forecast.step_cost import CostModel, LayerFacts
from ..registry import Registry
from .base import Job, Ladder, Level, Limits, Policy, Progress, Work

__all__ = ["CostModel", "Job", "Ladder", "LayerFacts", "Level", "Limits", "Policy", "Progress", "Work", "policies"]

policies: Registry[Callable[..., Policy]] = Registry(
    "policy",
    {
        "elastic": ("moe_prism.schedule.elastic:ElasticPolicy", "mixed batches, deadlines first, then quality (default)"),
        "prism": (
            "moe_prism.schedule.prism:Prism",
            "the paper: virtual queues per level, best predicted tokens per second",
            "arXiv 2510.19366",
        ),
        "edf": (
            "moe_prism.schedule.edf:Edf",
            "the paper's released code: earliest deadline first, a gate on raising the batch K",
            "arXiv 2510.19366",
        ),
        "fifo": ("moe_prism.schedule.fifo:Fifo", "order of arrival, the batch at its highest floor"),
        "full-batch": (
            "moe_prism.schedule.full_batch:FullBatch",
            "waits for a full batch and runs it to its end",
            "arXiv 2510.19366",
        ),
    },
)
"""name -> class; build one as `policies.get(name)(ladder, cost, **options)`."""

"""Who runs next, and at which quality: request classes, cost model, policies, simulator. Pure: no engine, no clock."""

from __future__ import annotations

from .base import Job, Ladder, Level, Limits, Policy, Progress, Work

__all__ = ["Job", "Ladder", "Level", "Limits", "Policy", "Progress", "Work"]

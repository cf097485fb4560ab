"""What an evaluation by tasks is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Which tasks, at which operating points.

    >>> import moe_prism
    >>> moe_prism.EvaluateOptions(tasks=["arc_easy"], limit=100).points
    ['full']
    """

    tasks: list[str] = option([], "Comma-separated tasks of lm-eval, by its names.")
    points: list[str] = option(
        ["full"],
        "Comma-separated operating points: names in the folder's frontier.json, files, budgets like 0.5, or full.",
    )
    include_path: str | None = option(None, "Folder with tasks of your own, as lm-eval reads them.")
    limit: float | None = option(None, "Questions per task: a number, or a share below 1. Default: all.", above=0)
    num_fewshot: int | None = option(None, "Examples before each question. Default: the task's own.", least=0)
    batch_size: int = option(1, "Requests that run together.", least=1)
    chat: bool = option(False, "Ask through the model's chat template.")
    seed: int = option(0, "Of examples and of the bootstrap.", least=0)

    def check(self) -> None:
        super().check()
        if not self.tasks:
            raise UsageError("--tasks names none", "give tasks of lm-eval, like --tasks arc_easy,hellaswag")
        if not self.points:
            raise UsageError("--points names none", "give full, a budget like 0.5, or a measured point's name")
        if len(set(self.points)) < len(self.points):
            raise UsageError("--points names one twice", "name each once")

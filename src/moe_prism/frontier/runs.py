"""Measured frontiers of several models side by side, at equal shares and at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..result import Findings
from .evaluation import FILE, Evaluation
from .record import Frontier, MeasuredPoint

SHARES = (0.75, 0.5, 0.25)
FRONTIER = "frontier.json"


@dataclass(frozen=True)
class MeasuredRun:
    """One measured frontier, its tasks if any were run, and what it is called here."""

    name: str
    frontier: Frontier
    evaluation: Evaluation | None

    @property
    def full_bytes(self) -> float:
        """Expert bytes that a token of the full model reads."""
        return max(p.active_expert_bytes for p in self.frontier.every)

    @property
    def text(self) -> str:
        """What it was measured on: text, and tokens."""
        facts = self.frontier.provenance.get("evaluation", {})
        return f"{facts.get('text', 'unknown text')}, {facts.get('tokens', 0)} tokens"

    def within(self, most: float) -> MeasuredPoint | None:
        """The point with the least KL among those that read at most this many bytes per token."""
        fits = [p for p in self.frontier.every if p.active_expert_bytes <= most * (1 + 1e-9)]
        return min(fits, key=lambda p: (p.kl, p.active_expert_bytes), default=None)

    def to_json(self) -> dict[str, Any]:
        """What a table says of it."""
        best = {f"{share:g}": self.within(share * self.full_bytes) for share in SHARES}
        return {
            "run": self.name,
            "model": self.frontier.model,
            "source": self.frontier.source,
            "text": self.text,
            "points": len(self.frontier.every),
            "full_expert_bytes": self.full_bytes,
            "at_share": {share: _said(point) for share, point in best.items()},
            "scores": [] if self.evaluation is None else self.evaluation.to_json()["points"],
        }


def _said(point: MeasuredPoint | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {"name": point.name, "kl": point.kl, "top1_agreement": point.top1_agreement, "bytes": point.active_expert_bytes}


def read_runs(paths: Sequence[str | Path]) -> list[MeasuredRun]:
    """Runs from folders with a frontier.json, or from such files. UsageError for a path without one; names are told apart."""
    if not paths:
        raise UsageError("there is nothing to compare", "give folders with a frontier.json")
    found = []
    for path in map(Path, paths):
        file = path / FRONTIER if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"there is no {file}", "measure the model with `moe-prism frontier`")
        tasks = file.parent / FILE
        frontier = Frontier.load(file)
        if not frontier.every:
            raise UsageError(f"{file} has no points", "measure some with `moe-prism frontier`")
        found.append(MeasuredRun(file.absolute().parent.name, frontier, Evaluation.load(tasks) if tasks.is_file() else None))
    names = [run.name for run in found]
    return [
        MeasuredRun(f"{i}:{run.name}" if names.count(run.name) > 1 else run.name, run.frontier, run.evaluation)
        for i, run in enumerate(found, 1)
    ]


def compare_runs(paths: Sequence[str | Path]) -> Findings:
    """Measured frontiers side by side: KL at equal shares of bytes, tasks, and why the figures should not be compared.

    paths: folders with a frontier.json, or such files. Raises UsageError for one without.

    >>> import moe_prism
    >>> asked = moe_prism.FrontierOptions(methods=("uniform",), tokens=256, length=128, calibration_tokens=256)
    >>> moe_prism.measure_frontier("nano", asked).save("frontier.json")
    >>> found = moe_prism.compare_runs(["frontier.json", "frontier.json"])
    >>> len(found.to_records()), found["doubts"]
    (2, [])
    """
    found = read_runs(paths)
    return Findings({"runs": [run.to_json() for run in found], "doubts": doubts(found)}, "runs")


def doubts(runs: Sequence[MeasuredRun]) -> list[str]:
    """Why these figures should not be compared, in sentences."""
    said = []
    if len({run.text for run in runs}) > 1:
        said.append("The runs were measured on different text: " + "; ".join(f"{run.name}: {run.text}" for run in runs) + ".")
    if len({run.frontier.source for run in runs}) > 1:
        said.append("KL is to each run's own source, and the sources differ: compare top-1 agreement and tasks with care.")
    return said

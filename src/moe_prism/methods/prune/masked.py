"""Expert pruning as a method, in mask mode: the same active bytes per token, fewer experts in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from ...calibrate.run import Pass, Settings
from ...calibrate.statistics import Statistics
from ...compress.prune import KeptExperts, choose, criteria
from ...compress.prune.change import PruneChange
from ...compress.prune.choose import keep_counts
from ...errors import UsageError
from ...model.router import find_routers
from ...options.prune import Allocation, PruneOptions
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from .select import Curve, check_options, loss_curves, rank, request_of, spend

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True, kw_only=True)
class PruneParameters:
    """criterion: what ranks the experts; allocation: `layer` the same number everywhere, `global` one ranking, `measured` by loss."""

    criterion: str = "easy-ep"
    allocation: Allocation = "layer"


class Prune(Method):
    """`prune:CRITERION` or `prune:CRITERION-ALLOCATION`, at FRACTIONS of the experts (those that leave k and fill the groups).

    Active bytes per token hardly change, because a token uses k experts as before; what falls is what has to be in memory.
    """

    acts = "weights"
    Parameters = PruneParameters
    parameters: PruneParameters

    @classmethod
    def written(cls, name: str) -> str:
        return f"{name}:CRITERION-ALLOCATION"

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> PruneParameters:
        """A wrong name is told before anything is measured."""
        text = text or PruneParameters.criterion
        for allocation in get_args(Allocation):
            if text.endswith(f"-{allocation}") and text.removesuffix(f"-{allocation}") in criteria.names():
                return PruneParameters(criterion=text.removesuffix(f"-{allocation}"), allocation=allocation)
        criteria.get(text)  # names the legal ones
        return PruneParameters(criterion=text)

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        criterion, allocation = self.parameters.criterion, self.parameters.allocation
        layers = [layer.parts.layer for layer in subject.elastic.layers]
        routers = find_routers(subject.model, layers)
        needs = {"counts", *criteria.get(criterion).needs}
        statistics = self._statistics(subject, tuple(sorted(needs)))
        options = PruneOptions(criterion=criterion, allocation=allocation)
        check_options(options)
        scores, shields = rank(layers, statistics, options, subject.k)
        groups = [router.groups for router in routers]
        found: list[NamedPoint] = []
        seen: list[list[KeptExperts]] = []
        refused: UsageError | None = None
        for keep in FRACTIONS:
            request = request_of(replace(options, keep=keep))
            try:
                counts = keep_counts(scores, request, subject.k, shields, groups)
                if allocation == "measured":
                    counts = spend(self._curves(subject, scores, shields, options.profile_tokens), sum(counts))
                choices = choose(scores, request, subject.k, shields, groups, counts)
            except UsageError as error:
                refused = error
                continue
            if choices not in seen and not all(
                choice.is_full for choice in choices
            ):  # few experts: shares round to the same number
                seen.append(choices)
                found.append(self._point(choices))
        if not found:
            raise refused or UsageError(f"method '{self.name}' has no point on this model", "choose another method")
        return found

    def _statistics(self, subject: Subject, names: tuple[str, ...]) -> Statistics:
        """One pass for all criteria that ask for the same collectors."""
        key = f"prune-statistics {' '.join(names)}"
        if key not in subject.cache:
            elastic = subject.elastic
            work = Pass(subject.model, [layer.parts.layer for layer in elastic.layers], Settings(collectors=names))
            try:
                with subject.report("calibrate") as update:
                    work.run(subject.calibration, update)
            finally:
                for layer in elastic.layers:  # the pass took the hooks for itself
                    layer.parts.layer.install(layer)
            subject.cache[key] = work.statistics()
        found: Statistics = subject.cache[key]
        return found

    def _curves(self, subject: Subject, scores: Sequence[Tensor], shields: Sequence[Tensor], tokens: int) -> list[Curve]:
        """The profile of the criterion, measured once for all fractions."""
        key = f"prune-curves {self.name}"
        if key not in subject.cache:
            ids: Tensor = subject.calibration
            wanted = max(1, tokens // ids.shape[1])
            ids = ids[:: max(1, len(ids) // wanted)][:wanted]
            with subject.report("profile") as update:
                subject.cache[key] = loss_curves(subject.model, subject.elastic, scores, shields, ids, update)
        found: list[Curve] = subject.cache[key]
        return found

    def _point(self, choices: Sequence[KeptExperts]) -> NamedPoint:
        kept = sum(len(c.kept) for c in choices) / sum(c.experts for c in choices)
        return NamedPoint(name=f"{self.name}-{kept:.4g}", point=OperatingPoint(weights=PruneChange(tuple(choices)).part()))

"""Expert pruning as a method, in mask mode: the same active bytes per token, fewer experts in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from ...calibrate.statistics import Statistics
from ...compress.prune import KeptExperts, choose, criteria
from ...compress.prune.change import PruneChange
from ...compress.prune.choice import keep_counts
from ...errors import UsageError
from ...model.router import find_routers
from ...options.prune import Allocation, ExpertForm, PruneOptions
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from ..statistics import statistics_of
from .select import (
    Curve,
    check_options,
    collectors_of,
    form_of,
    least_kept,
    loss_curves,
    rank,
    request_of,
    spend,
    with_constants,
)

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True, kw_only=True)
class PruneParameters:
    """criterion: what ranks the experts; allocation: `layer` the same number everywhere, `global` one ranking, `measured` by loss.

    form: what is left of an expert that goes, `removed` or `constant`; None: what the criterion was made for.
    """

    criterion: str = "easy-ep"
    allocation: Allocation = "layer"
    form: ExpertForm | None = None


class Prune(Method):
    """`prune:CRITERION-FORM-ALLOCATION`, the last two where they are wanted, at FRACTIONS of the experts (those that leave k and fill the
    groups).

    Active bytes per token hardly change, because a token uses k experts as before; what falls is what has to be in memory.
    """

    acts = "weights"
    Parameters = PruneParameters
    parameters: PruneParameters

    @classmethod
    def written(cls, name: str) -> str:
        return f"{name}:CRITERION-FORM-ALLOCATION"

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> PruneParameters:
        """A wrong name is told before anything is measured."""
        text = text or PruneParameters.criterion
        names = criteria.names()
        for form in (None, *get_args(ExpertForm)):
            for allocation in (None, *get_args(Allocation)):
                end = "".join(f"-{part}" for part in (form, allocation) if part)
                if text.endswith(end) and text.removesuffix(end) in names:
                    return PruneParameters(criterion=text.removesuffix(end), allocation=allocation or "layer", form=form)
        criteria.get(text)  # names the legal ones
        return PruneParameters(criterion=text)

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        options = PruneOptions(criterion=asked.criterion, allocation=asked.allocation, form=asked.form)
        check_options(options)
        layers = [layer.parts.layer for layer in subject.elastic.layers]
        routers, constant = find_routers(subject.model, layers), form_of(options) == "constant"
        statistics = statistics_of(subject, tuple(sorted({"counts", *collectors_of(options)})))
        scores, shields = rank(layers, statistics, options, subject.k)
        groups = [None if constant else router.groups for router in routers]
        least = least_kept(form_of(options), subject.k)
        found: list[NamedPoint] = []
        seen: list[list[KeptExperts]] = []
        refused: UsageError | None = None
        for keep in FRACTIONS:
            request = request_of(replace(options, keep=keep))
            try:
                counts = keep_counts(scores, request, least, shields, groups)
                if asked.allocation == "measured":
                    ranking = self._curves(subject, (scores, shields), options.profile_tokens, statistics if constant else None)
                    counts = spend(ranking, sum(counts))
                choices = choose(scores, request, least, shields, groups, counts)
                choices = with_constants(choices, statistics) if constant else choices
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

    def _curves(
        self,
        subject: Subject,
        ranking: tuple[Sequence[Tensor], Sequence[Tensor]],
        tokens: int,
        constants: Statistics | None,
    ) -> list[Curve]:
        """The profile of the criterion, measured once for all fractions."""
        key = f"prune-curves {self.name}"
        if key not in subject.cache:
            ids: Tensor = subject.calibration
            wanted = max(1, tokens // ids.shape[1])
            ids = ids[:: max(1, len(ids) // wanted)][:wanted]
            with subject.report("profile") as update:
                subject.cache[key] = loss_curves(subject.model, subject.elastic, ranking, ids, update, constants)
        found: list[Curve] = subject.cache[key]
        return found

    def _point(self, choices: Sequence[KeptExperts]) -> NamedPoint:
        kept = sum(len(c.kept) for c in choices) / sum(c.experts for c in choices)
        return NamedPoint(name=f"{self.name}-{kept:.4g}", point=OperatingPoint(weights=PruneChange(tuple(choices)).part()))

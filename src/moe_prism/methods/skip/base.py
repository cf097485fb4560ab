"""Expert skipping as methods: every one makes a routing stage for a mean number of experts per token, fitted on calibration text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ...catalogue import methods
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint, RoutingStage
from ...registry import choices
from ...routing.base import SkipStage, Stage, mean_kept
from ..base import Method, Subject
from .profile import own_rule, samples

STEP = 0.5  # between the means of a curve
COUNTS = "sensitivity"  # what gives the counts to a method that spends them by token or by batch


@dataclass(frozen=True)
class Fitted:
    """A stage, and how it was made (plain JSON). mean: experts per token and layer."""

    stage: RoutingStage
    mean: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class SkipMethod(Method):
    """A method whose points are one routing stage each."""

    acts = "routing"
    stage: ClassVar[type[Stage] | None] = None
    """A stage of the method's own, which then has its name; None: one of `routing.routing_stages`."""
    leaves_out_neurons: ClassVar[bool] = False
    """Whether its points compute a part of an expert's neurons."""
    multiplies_inside: ClassVar[bool] = False
    """Whether its points multiply what experts read by numbers of the token's own."""

    @abstractmethod
    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        """A stage that keeps `mean` of k experts per token and layer; None: what the argument says, where it says a count by itself."""

    def point(self, subject: Subject, mean: float | None, keep_mass: bool | None = None) -> NamedPoint:
        """The point, with what happens to the weights settled (keep_mass None: as the model's router does it) and its making on record."""
        if mean is not None and not 1 <= mean <= subject.k:  # also refuses nan
            raise UsageError(f"a mean of {mean:g} experts per token is outside 1..{subject.k}", "give a number between them")
        fitted = self.fit(subject, mean)
        stage = replace(fitted.stage, keep_mass=own_rule(subject) if keep_mass is None else keep_mass)
        made = {"method": self.name, "experts_per_token": subject.k, "mean": fitted.mean, **fitted.facts}
        return NamedPoint(name=f"{self.name}-{fitted.mean:.3g}", point=OperatingPoint(routing=(stage,)), made=made)

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        return [self.point(subject, mean) for mean in self.means(subject)]

    def means(self, subject: Subject) -> Sequence[float | None]:
        """Means worth a point, dearest first: every half expert below k, or as many as were asked for, down to 1."""
        if subject.k < 2:
            raise UsageError(f"method '{self.name}' skips experts, and this model has one per token", "measure other methods")
        points = round((subject.k - 1) / STEP) if subject.points is None else subject.points - 1
        return [subject.k - (subject.k - 1) * (i + 1) / points for i in range(points)]


def skip_method(name: str) -> SkipMethod:
    """A method of this kind by name; UsageError for any other."""
    plain, colon, argument = name.partition(":")
    known = methods.names("routing")
    if methods.own_name(plain) not in known:
        raise UsageError(f"method '{plain}' makes no skip plan", choices(plain, known))
    found: type[SkipMethod] = methods.get(plain)
    return found(name, found.read_argument(name, argument if colon else None))


def counts_of(name: str | None, subject: Subject, mean: float | None) -> Fitted:
    """Plain counts per layer, by a method that gives them."""
    fitted = skip_method(name or COUNTS).fit(subject, mean)
    if fitted.stage.stage != "top-n":
        raise UsageError(f"'{name}' gives no counts per layer", "take uniform, pattern-skip or sensitivity")
    return fitted


def fitted_counts(stage: RoutingStage, facts: Mapping[str, Any] | None = None) -> Fitted:
    """Of a stage that keeps its counts."""
    return Fitted(stage, sum(stage.layers) / len(stage.layers), facts or {})


def fitted_tokens(subject: Subject, stage: RoutingStage, made: type[SkipStage]) -> Fitted:
    """Of a stage that decides by token: its mean on the calibration text."""
    return Fitted(stage, mean_kept(made([stage]), samples(subject, made)), calibration_facts(subject))


def given(name: str, mean: float | None) -> float:
    """UsageError where no mean was given."""
    if mean is None:
        raise UsageError(f"method '{name}' needs a mean", "say with --mean how many experts per token are kept on average")
    return mean


def all_experts(subject: Subject) -> tuple[int, ...]:
    """k in every layer: no limit."""
    return (subject.k,) * subject.layers


def calibration_facts(subject: Subject) -> dict[str, Any]:
    """How much text a stage was fitted on."""
    return {"calibration_tokens": subject.calibration.numel()}

"""Expert skipping as methods: every one makes a `SkipPlan` for a mean number of experts per token, fitted on calibration text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...elastic.bind_plans import made, policy_for
from ...elastic.runtime import Setting
from ...errors import UsageError
from ...frontier.allocation import exact
from ...registry import choices
from ...routing import SkipPlan
from ...routing.patterns import IndexOver, Rounding, pattern_skip, shaped, uniform, whole_total
from ...routing.score_mass import fit_score_mass
from ...routing.token_threshold import fit_naee, fit_ser
from ...routing.weight_level import fit_weight_level
from ..base import Candidate, Method, Subject, methods
from .profile import own_rule, profile, refine, samples

STEP = 0.5  # between the means of a curve
COUNTS = "sensitivity"  # what gives the counts to a method that spends them by token or by batch


@dataclass(frozen=True)
class SkipOptions:
    """How `pattern-skip` counts its layers and rounds, and whether weights are scaled up (None: as the model's router does)."""

    rounding: Rounding = "half-up"
    index_over: IndexOver = "moe"
    keep_mass: bool | None = None


class SkipMethod(Method):
    """A method whose points are skip plans."""

    @abstractmethod
    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        """A plan that keeps `mean` of k experts per token and layer; None: what the argument says, where it says a count by itself."""

    def finished(self, subject: Subject, mean: float | None, options: SkipOptions | None = None) -> SkipPlan:
        """The plan, with what happens to the weights settled and how it was made on record."""
        options = options or SkipOptions()
        if mean is not None and not 1 <= mean <= subject.k:  # also refuses nan
            raise UsageError(f"a mean of {mean:g} experts per token is outside 1..{subject.k}", "give a number between them")
        plan = self.plan(subject, mean, options)
        keep_mass = own_rule(subject) if options.keep_mass is None else options.keep_mass
        return plan.with_(keep_mass=keep_mass, made={"method": self.name, "experts_per_token": subject.k, **plan.made})

    def candidates(self, subject: Subject) -> Sequence[Candidate]:
        plans = [self.finished(subject, mean) for mean in self.means(subject)]
        return [Candidate(f"{self.name}-{_mean(plan):.3g}", Setting(routing=made([plan]))) for plan in plans]

    def means(self, subject: Subject) -> Sequence[float | None]:
        """Means worth a point, dearest first: every half expert below k, or as many as were asked for, down to 1."""
        if subject.k < 2:
            raise UsageError(f"method '{self.name}' skips experts, and this model has one per token", "measure other methods")
        points = round((subject.k - 1) / STEP) if subject.points is None else subject.points - 1
        return [subject.k - (subject.k - 1) * (i + 1) / points for i in range(points)]


class Uniform(SkipMethod):
    """The same count in every layer: what `num_experts_per_tok` would do."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        self.refuse_argument()
        mean = _given(self.name, mean)
        if mean != int(mean):
            raise UsageError(f"method 'uniform' cannot keep {mean:g} experts", "give a whole number, or take `sensitivity`")
        return uniform(len(subject.elastic.layers), subject.k, int(mean))

    def means(self, subject: Subject) -> Sequence[float | None]:
        return sorted({mean for mean in super().means(subject) if mean is not None and mean == int(mean)}, reverse=True)


class PatternSkip(SkipMethod):
    """`pattern-skip:B-H-E-P`, or `pattern-skip:SHAPE` (descending, the default; ascending, peak, valley) at any mean."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        layers, knots = len(subject.elastic.layers), self._knots()
        if knots is None:
            return shaped(layers, subject.k, self.argument or "descending", _given(self.name, mean))
        b, h, e, p = knots
        total = None if mean is None else whole_total(layers, subject.k, mean)
        rounding = options.rounding if total is None else "budget"
        positions, depth = _positions(subject) if options.index_over == "all" else (None, None)
        plan = pattern_skip(layers, subject.k, b, h, e, p, rounding=rounding, total=total, positions=positions, depth=depth)
        return plan.with_(made={"rounding": rounding, "index_over": options.index_over})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return super().means(subject) if self._knots() is None else [None]

    def _knots(self) -> tuple[int, int, int, int] | None:
        parts = (self.argument or "").split("-")
        if len(parts) != 4:
            return None
        if not all(part.isdigit() for part in parts):
            raise UsageError(f"'{self.argument}' is no pattern", "give b-h-e-p in whole numbers, for example 4-2-2-3, or a shape")
        b, h, e, p = (int(part) for part in parts)
        return b, h, e, p


class Sensitivity(SkipMethod):
    """Counts by an exact dynamic program over what every layer loses with n experts, then improved together.

    Losses of layers alone do not add up, so one expert at a time moves from a layer to another as long as the measured loss of the whole
    plan falls. `sensitivity:alone` stops before that. `sensitivity:isolated` too, and profiles every layer with all later ones down to one
    expert, so that none makes up for the loss (Alloc-MoE, arXiv 2604.08133).
    """

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        variant = _variant(self.argument)
        total = whole_total(len(subject.elastic.layers), subject.k, _given(self.name, mean))
        losses = profile(subject, isolated=variant == "isolated")
        best = exact([[(n + 1.0, loss) for n, loss in enumerate(row)] for row in losses], total)
        counts = tuple(choice + 1 for choice in best.choices)
        facts: dict[str, Any] = {"profile": [[round(loss, 9) for loss in row] for row in losses], "predicted_loss": best.loss}
        if variant is None:
            counts, facts["calibration_loss"] = refine(subject, counts)
        return SkipPlan(counts, mean=sum(counts) / len(counts), made=facts | _text(subject))


class Ser(SkipMethod):
    """`ser:K_MIN`: one threshold for all layers, the first K_MIN (1) experts always."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        least = _whole(self.name, self.argument, 1, subject.k)
        plan = fit_ser(_all(subject), samples(subject), _given(self.name, mean), least)
        return plan.with_(made=_text(subject))

    def means(self, subject: Subject) -> Sequence[float | None]:
        least = _whole(self.name, self.argument, 1, subject.k)
        return [mean for mean in super().means(subject) if mean is not None and mean >= least]


class Naee(SkipMethod):
    """Thresholds per layer and rank from calibration quantiles; without a mean the paper's median."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        self.refuse_argument()
        return fit_naee(_all(subject), samples(subject), mean).with_(made=_text(subject))


class ScoreMassMethod(SkipMethod):
    """The fewest experts that hold a share of the token's routing weight, the same share in all layers."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        self.refuse_argument()
        return fit_score_mass(_all(subject), samples(subject), _given(self.name, mean)).with_(made=_text(subject))


class WeightLevelMethod(SkipMethod):
    """`weight-level:METHOD`: a level per layer that keeps the counts of another method (default `sensitivity`) on average."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        counts = _counts(self.argument, subject, mean, options)
        return fit_weight_level(counts.layers, samples(subject)).with_(made=dict(counts.made) | _text(subject))

    def means(self, subject: Subject) -> Sequence[float | None]:
        return skip_method(self.argument or COUNTS).means(subject)


class Batch(SkipMethod):
    """`batch-redistribution:METHOD`: the counts of another method (default `sensitivity`) as a budget of the whole batch."""

    def plan(self, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
        plan = _counts(self.argument, subject, mean, options)
        return plan.with_(policy="batch-redistribution", parameters={"base": ((1.0,),) * len(plan.layers)})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return skip_method(self.argument or COUNTS).means(subject)


def _counts(name: str | None, subject: Subject, mean: float | None, options: SkipOptions) -> SkipPlan:
    """A plan of plain counts."""
    plan = skip_method(name or COUNTS).plan(subject, mean, options)
    if plan.policy != "top-n":
        raise UsageError(f"'{name}' gives no counts per layer", "take uniform, pattern-skip or sensitivity")
    return plan


def skip_method(name: str) -> SkipMethod:
    """A method of this kind by name; UsageError for any other."""
    plain, colon, argument = name.partition(":")
    found = methods.get(plain) if plain in methods.names() else None
    if found is None or not issubclass(found, SkipMethod):
        skipping = [known for known in methods.names() if issubclass(methods.get(known), SkipMethod)]
        raise UsageError(f"method '{plain}' makes no skip plan", choices(plain, skipping))
    return found(name, argument if colon else None)


def plan_candidates(plans: Sequence[tuple[str, SkipPlan]], subject: Subject) -> list[Candidate]:
    """Plans read from files, by name."""
    return [Candidate(name, Setting(routing=policy_for(subject.elastic, plan))) for name, plan in plans]


def _positions(subject: Subject) -> tuple[list[int], int]:
    """1-based places of the MoE layers among all decoder layers, and how many those are."""
    depth = subject.model.config.get_text_config().num_hidden_layers
    places = []
    for layer in subject.elastic.layers:
        numbers = [int(part) for part in layer.plan.layer.name.split(".") if part.isdigit()]
        if not numbers:
            raise UsageError(f"cannot tell which layer '{layer.plan.layer.name}' is in", "use --index-over moe")
        places.append(numbers[0] + 1)
    return places, depth


def _given(name: str, mean: float | None) -> float:
    if mean is None:
        raise UsageError(f"method '{name}' needs a mean", "say with --mean how many experts per token are kept on average")
    return mean


def _mean(plan: SkipPlan) -> float:
    return sum(plan.layers) / len(plan.layers) if plan.mean is None else plan.mean


def _all(subject: Subject) -> tuple[int, ...]:
    return (subject.k,) * len(subject.elastic.layers)


def _variant(argument: str | None) -> str | None:
    if argument not in (None, "alone", "isolated"):
        raise UsageError(
            f"method 'sensitivity' has no variant '{argument}'", "write sensitivity, sensitivity:alone or sensitivity:isolated"
        )
    return argument


def _whole(name: str, argument: str | None, default: int, most: int) -> int:
    if argument is None:
        return default
    if not argument.isdigit() or not 1 <= int(argument) <= most:
        raise UsageError(f"'{argument}' of '{name}' is no number of experts", f"give 1 to {most}")
    return int(argument)


def _text(subject: Subject) -> dict[str, Any]:
    return {"calibration_tokens": subject.calibration.numel()}

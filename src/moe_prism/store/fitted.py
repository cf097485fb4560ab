"""Who leaves a store and what is read ahead: what was asked for, then what was fitted, then the default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cores import processor
from ..errors import UsageError
from ..offload.base import KeySpace
from ..offload.cache import cache_policies
from ..offload.predict import predictors
from ..offload.settings import DECIDING, ExpertSettings, policy_of, predictor_of, read_settings
from .pools import Eviction, policy_for
from .read_ahead import Guess

ROUTER = "gate"
FIT = "fit it: moe-prism offload fit TRACE -o settings.json, then --expert-settings settings.json"


@dataclass(frozen=True)
class Chosen:
    """policy: a name, None = `pools.policy_for`; settings: of it, None = the fitted ones; predictor: a name, None = the fitted one."""

    policy: str | None
    settings: dict[str, Any] | None
    width: int
    predictor: str | None
    fitted: ExpertSettings | None

    def eviction(self, space: KeySpace, slots: int, group: int) -> Eviction:
        """For a store with so many slots for these keys; group: see `Eviction`. Quotas are those of the fitted policy alone."""
        if self.fitted is not None and self.settings is None:
            policy, settings = policy_of(self.fitted, space)
            return Eviction(policy, settings, group, self.fitted.quotas)
        return Eviction(cache_policies.get(self.policy or policy_for(space, slots, group)), self.settings or {}, group)

    def guess(self, space: KeySpace, hidden: int) -> Guess:
        """What is read ahead in a store with these keys."""
        if self.fitted is None or not self.width or self.predictor == ROUTER:
            return Guess(self.width)
        return Guess(self.width, predictor_of(self.fitted, space, hidden))


def choose(policy: str | None, settings: dict[str, Any], width: int | None, predictor: str | None, file: Path | None) -> Chosen:
    """From the options of a store. UsageError for a name that is not known, that cannot run here, or that was not fitted."""
    fitted = None if file is None else read_settings(file)
    given: dict[str, Any] | None = settings
    if fitted is not None and not settings and policy in (None, fitted.policy):
        policy, given = fitted.policy, None
    if policy is not None:
        kind = cache_policies.get(policy)
        if kind.needs_future:
            raise UsageError(
                f"'{policy}' knows the future: it is a bound for replays",
                "replay it with `moe-prism inspect --routing`, and take lfu here",
            )
        if kind.needs_fit and given is not None and not given:
            raise UsageError(f"'{policy}' is fitted on a trace, and there are no settings of it here", FIT)
    return Chosen(policy, given, *_read_ahead(width, predictor, fitted), fitted)


def measured_elsewhere(fitted: ExpertSettings) -> str | None:
    """The processor on which the costs of deciding were measured, if it is another one."""
    made = fitted.made.get(DECIDING)
    name = made.get("processor") if isinstance(made, dict) else None
    return name[:80] if isinstance(name, str) and name != processor() else None


def _read_ahead(width: int | None, predictor: str | None, fitted: ExpertSettings | None) -> tuple[int, str | None]:
    """(width, predictor)."""
    own = None if fitted is None else fitted.predictor
    if predictor is not None:
        kind = predictors.get(predictor)
        if kind.needs_fit and own != predictor:
            raise UsageError(f"the predictor '{predictor}' is fitted on a trace, and there are no settings of it here", FIT)
        if width is None and own != predictor:
            raise UsageError(f"the predictor '{predictor}' reads nothing ahead without a width", "give --expert-ahead")
    if width is None:
        width = fitted.width if fitted is not None and own is not None else 0
    return width, predictor or own

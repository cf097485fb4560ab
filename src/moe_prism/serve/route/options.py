"""What there is to choose from, and what of it a request allows."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import UsageError
from ...pool import Chooser, ModelOption, Record, SubsetLimits
from ..http.refusal import Refusal
from .config import PoolFile
from .upstream import Upstream

FORGET = 0.2
"""Weight of the newest time in what is remembered of an option."""


class RequestLimits(NamedTuple):
    """What a request names. model: None: any; floor: least quality; level: a level by its name; ttft, tpot: seconds, soft."""

    model: str | None
    floor: float
    level: str | None
    ttft: float | None
    tpot: float | None
    fixed: bool  # the quality is said, and load may not lower it


@dataclass
class AnswerTimes:
    """Seconds to the first bytes of an answer, and per further part of a stream, as they were lately."""

    first: float | None = None
    part: float | None = None

    def note(self, first: float, part: float | None) -> None:
        """A finished answer."""
        self.first = first if self.first is None else (1 - FORGET) * self.first + FORGET * first
        if part is not None:
            self.part = part if self.part is None else (1 - FORGET) * self.part + FORGET * part

    def beyond(self, wanted: RequestLimits) -> float:
        """How many times the slower of the two is above its target; 1 where both are met, or nothing is known."""
        pairs = ((self.first, wanted.ttft), (self.part, wanted.tpot))
        return max(1.0, *(took / target for took, target in pairs if took is not None and target), 1.0)


class Choice(NamedTuple):
    """An option of one request, which stays what it is while the options of the pool change.

    lowest: the lowest level of its model that load may choose in its place; None: no lower one.
    """

    option: ModelOption
    upstream: Upstream
    times: AnswerTimes
    lowest: str | None = None


class PoolOptions:
    """The options of a pool, and the chooser that was fitted on them. Both follow what upstreams list, or what a record says there is."""

    def __init__(self, pool: PoolFile, upstreams: Sequence[Upstream], record: Record | None, names: Sequence[str]) -> None:
        """names: of the record's options. UsageError for those of another pool, and where no option is within the pool's limits."""
        self.pool, self.upstreams, self.record, self.names = pool, {u.form.name: u for u in upstreams}, record, list(names)
        found = pool.form.limits
        self.limits = SubsetLimits(found.seconds or math.inf, math.inf if found.energy is None else found.energy)
        self.paces: dict[str, AnswerTimes] = {}
        self.known: tuple[tuple[str, ...], ...] = ()
        self.every: list[ModelOption] = []
        self.chooser: Chooser | None = None
        self.refit()

    def refit(self) -> None:
        """After looks at the upstreams. Nothing happens where none lists other levels than before."""
        known = tuple(tuple(level.name for level in u.levels) for u in self.upstreams.values())
        if known == self.known and self.known:
            return
        self.known = known
        every = self._recorded() if self.record is not None else self._listed()
        if every != self.every:
            self.every = every
            self.chooser = self.pool.chooser.fit(every, self.record, self.limits, self.pool.settings) if every else None

    def _listed(self) -> list[ModelOption]:
        found = []
        for name, upstream in self.upstreams.items():
            form = upstream.form
            top = max((level.slots for level in upstream.levels), default=1.0) or 1.0
            found += [
                ModelOption(name, level.name, form.quality * level.quality, form.cost * level.slots / top)
                for level in upstream.levels
            ]
        return found

    def _recorded(self) -> list[ModelOption]:
        """Quality is the mean over the record, as a share of the best option's."""
        assert self.record is not None
        means = self.record.quality.mean(0)
        best = float(means.max()) or 1.0
        found = []
        for nth, name in enumerate(self.names):
            model, _, level = name.partition("@")
            if model not in self.upstreams:
                raise UsageError(f"the record has '{name[:80]}', which is no model of this pool", "measure the pool again")
            upstream = self.upstreams[model]
            slots = {each.name: each.slots for each in upstream.levels}
            share = slots.get(level, 1.0) / (max(slots.values(), default=1.0) or 1.0) if slots else 1.0
            found.append(ModelOption(model, level, float(means[nth]) / best, upstream.form.cost * min(1.0, share)))
        return found

    def upstream(self, option: int) -> Upstream:
        return self.upstreams[self.every[option].model]

    def pace(self, option: int) -> AnswerTimes:
        return self.paces.setdefault(self.every[option].name, AnswerTimes())

    def is_there(self, option: int) -> bool:
        """Its upstream lives and lists this level."""
        upstream = self.upstream(option)
        return upstream.up and any(level.name == self.every[option].level for level in upstream.levels)

    def allowed(self, wanted: RequestLimits) -> list[int]:
        """Options that a request may get, whether they are up or not. Refusal where no option of the pool ever meets its limits."""
        mine = [o for o, each in enumerate(self.every) if wanted.model in (None, each.model)]
        if wanted.level is not None:
            found = [o for o in mine if self.every[o].level == wanted.level]
            if mine and not found:
                names = [self.every[o].level for o in mine]
                near = difflib.get_close_matches(wanted.level, names, 1)
                said = f"; did you mean '{near[0]}'?" if near else ""
                raise Refusal(400, f"there is no quality level '{wanted.level[:64]}'{said}", param="quality")
            return found
        found = [o for o in mine if self.every[o].quality >= wanted.floor - 1e-9]
        if mine and not found:
            best = max(mine, key=lambda o: self.every[o].quality)
            top = self.every[best]
            raise Refusal(400, f"no model has this quality; the highest is {top.quality:.3f} of '{top.name}'", param="quality")
        return found

    def order(self, text: str, wanted: RequestLimits) -> list[Choice]:
        """What to try, best first: those that met the request's targets lately before those that did not, the least late first."""
        allowed = [o for o in self.allowed(wanted) if self.is_there(o)]
        if self.chooser is None or not allowed:
            return []
        chosen = self.chooser.order(text, allowed)
        late = {o: self.pace(o).beyond(wanted) for o in chosen}
        in_time = sorted(chosen, key=lambda o: late[o])  # stable: among those in time the chooser's order stays
        return [self.choice(o, self._lowest(o, wanted)) for o in in_time]

    def choice(self, option: int, lowest: str | None = None) -> Choice:
        """An option as a request takes it."""
        return Choice(self.every[option], self.upstream(option), self.pace(option), lowest)

    def _lowest(self, option: int, wanted: RequestLimits) -> str | None:
        """The lowest level of the same model that a request allows."""
        if wanted.fixed or wanted.level is not None:
            return None
        mine = self.every[option]
        below = [o for o in self.allowed(wanted) if self.every[o].model == mine.model and self.every[o].quality < mine.quality]
        return self.every[min(below, key=lambda o: self.every[o].quality)].level if below else None


def energies(names: Sequence[str], upstreams: Sequence[Upstream]) -> np.ndarray:
    """[O] of keeping the model of each option ready."""
    forms = {u.form.name: u.form for u in upstreams}
    found = (forms.get(name.partition("@")[0]) for name in names)
    return np.array([0.0 if form is None else form.cost if form.energy is None else form.energy for form in found])

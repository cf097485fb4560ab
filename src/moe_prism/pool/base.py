"""The contract of choosing among whole models.

Shapes: Q recorded questions, O options. An option is a model of the pool at one of its quality levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ModelOption:
    """A model at a quality level. quality: 0..1, on the scale of the whole pool; cost: of a token, in the pool's own unit."""

    model: str
    level: str
    quality: float
    cost: float

    @property
    def name(self) -> str:
        return f"{self.model}@{self.level}"


@dataclass(frozen=True)
class SubsetLimits:
    """What a chosen set may take. seconds: of a question on its slowest option; energy: of all models that are kept ready, summed."""

    seconds: float = math.inf
    energy: float = math.inf


@dataclass(frozen=True)
class Record:
    """What every option did on questions whose answers are known.

    texts: [Q]; quality: [Q, O], 0..1; seconds: [Q, O] to the end of the answer; energy: [O] of keeping an option ready, in the pool's unit;
    support: [Q, O], the probability that an option gives the known answer, 0..1, where it is known; skills: [Q] names, where somebody
    said which a question needs.
    """

    texts: Sequence[str]
    quality: Floats
    seconds: Floats
    energy: Floats
    support: Floats | None = None
    skills: Sequence[Sequence[str]] = field(default=())

    def check(self, options: int) -> None:
        """UsageError for shapes that do not fit each other or the options, and for values that are no record."""
        shape = (len(self.texts), options)
        said = {"quality": self.quality, "seconds": self.seconds}
        said |= {} if self.support is None else {"support": self.support}
        for name, values in said.items():
            if values.shape != shape:
                raise UsageError(f"the record's {name} has the shape {values.shape}, not {shape}", "measure the pool again")
            if not np.isfinite(values).all() or (values < 0).any() or (name != "seconds" and (values > 1).any()):
                raise UsageError(f"the record's {name} holds a value that is none", "measure the pool again")
        if not self.texts:
            raise UsageError("the record has no question", "measure the pool on some")
        if self.energy.shape != (options,) or not np.isfinite(self.energy).all() or (self.energy < 0).any():
            raise UsageError(f"the record's energy is not {options} amounts", "measure the pool again")
        if self.skills and len(self.skills) != len(self.texts):
            raise UsageError("the record has skills for some questions only", "give them for all, or for none")


@dataclass(frozen=True)
class NothingToSet:
    """Nothing can be set."""


class Chooser(ABC):
    """A way to choose. It is fitted once, and then asked for every question. Same inputs, same answers."""

    needs_record: ClassVar[bool] = True
    Parameters: ClassVar[type[Any]] = NothingToSet
    """A frozen dataclass whose docstring says what each field means."""

    @classmethod
    @abstractmethod
    def fit(cls, options: Sequence[ModelOption], record: Record | None, limits: SubsetLimits, settings: Any) -> Self:
        """settings: an instance of `Parameters`. UsageError where no option is within the limits, or without a record that it needs."""

    @abstractmethod
    def chosen(self) -> list[int]:
        """The options that it uses at all, rising."""

    @abstractmethod
    def order(self, text: str, allowed: Sequence[int]) -> list[int]:
        """Those of `allowed` that it uses, best for this question first. The later ones are for when the earlier ones do not answer."""

    @classmethod
    def example(cls) -> tuple[list[ModelOption], Record, SubsetLimits]:
        """For the generic tests: three models of which each is best at one kind of question."""
        kinds = ("def parse(line): return line.split()", "the river ran through the old town", "<div class='a'><p>text</p></div>")
        texts = [f"{text} {i}" for i in range(8) for text in kinds]
        quality = np.full((len(texts), 4), 0.3)
        for row in range(len(texts)):
            quality[row, row % 3] = 0.9
        quality[:, 3] = 0.5
        options = [
            ModelOption(name, "full", 0.5, cost) for name, cost in (("code", 2.0), ("prose", 2.0), ("web", 2.0), ("small", 1.0))
        ]
        seconds = np.tile(np.array([0.2, 0.2, 0.2, 0.1]), (len(texts), 1))
        return options, Record(texts, quality, seconds, np.array([2.0, 2.0, 2.0, 1.0])), SubsetLimits()


def recorded(record: Record | None, name: str) -> Record:
    """UsageError where there is none."""
    if record is None:
        raise UsageError(
            f"the chooser '{name}' needs a record of the pool", "measure one with `moe-prism route pool.yaml --measure`"
        )
    return record


def within(options: Sequence[ModelOption], record: Record, limits: SubsetLimits) -> list[int]:
    """Options that keep the limits alone. UsageError where none does."""
    seconds = record.seconds.mean(0)
    found = [o for o in range(len(options)) if seconds[o] <= limits.seconds and record.energy[o] <= limits.energy]
    if not found:
        raise UsageError("no option of the pool is within its limits", "raise limits.seconds or limits.energy")
    return found

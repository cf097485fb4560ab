"""The cheapest option that meets a request's limits: what a pool does without a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Chooser, ModelOption, Record, SubsetLimits, within


class Cheapest(Chooser):
    """By cost, then by quality, then in the order of the file. The text of a question says nothing here."""

    needs_record = False

    def __init__(self, options: Sequence[ModelOption], used: Sequence[int]) -> None:
        self.options, self.used = options, sorted(used)

    @classmethod
    def fit(cls, options: Sequence[ModelOption], record: Record | None, limits: SubsetLimits, settings: Any) -> Cheapest:
        return cls(options, range(len(options)) if record is None else within(options, record, limits))

    def chosen(self) -> list[int]:
        return list(self.used)

    def order(self, text: str, allowed: Sequence[int]) -> list[int]:
        found = [o for o in self.used if o in allowed]
        return sorted(found, key=lambda o: (self.options[o].cost, -self.options[o].quality, o))

"""Ask a model its slices at many operating points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...elastic import Elastic
from ...elastic.bind import Step, bind
from ...errors import UsageError
from ...point import FULL, OperatingPoint
from ..record import SliceScore
from . import ALL, slices
from .base import LEAST, Material, NoQuestionsError, Slice, score


@dataclass(frozen=True)
class Judged:
    """points: scores by slice, of each point; left_out: slices that this text or model has no questions for, and why."""

    points: tuple[Mapping[str, SliceScore], ...]
    left_out: Mapping[str, str]


class Judge:
    """The slices, with their questions and the full model's verdicts. UsageError for a slice named that has no questions here."""

    def __init__(self, model: Any, tokenizer: Any, ids: Tensor, names: Sequence[str]) -> None:
        """names: of slices, or `all`, which leaves out what has no questions. ids [n, length]: held-out windows."""
        self.model = model
        elastic: Elastic = model._moe_prism
        self.slices: dict[str, tuple[Slice, Tensor]] = {}
        self.left_out: dict[str, str] = {}
        with elastic.at([FULL]), torch.no_grad():
            material = Material(model, tokenizer, ids)
            for name in dict.fromkeys(slices.names() if ALL in names else names):
                try:
                    self._make(name, material)
                except NoQuestionsError as error:
                    if name in names:
                        raise UsageError(
                            f"slice '{name}' cannot be judged: {error}", "leave it out, or give other text"
                        ) from None
                    self.left_out[name] = str(error)

    def _make(self, name: str, material: Material) -> None:
        made = slices.get(name)(material)
        full = made.verdicts(material.model)
        if int((full > 0).sum()) < LEAST:
            raise NoQuestionsError(f"the full model gets {int((full > 0).sum())} of {len(full)} right, fewer than {LEAST}")
        self.slices[name] = made, full

    def ask(self, points: Sequence[OperatingPoint], progress: Callable[[int, int], None] | None = None) -> Judged:
        """Every point, one after the other."""
        found: list[Mapping[str, SliceScore]] = []
        elastic: Elastic = self.model._moe_prism
        for done, point in enumerate(points, 1):
            with elastic.at(Step(bind(elastic, [point]))), torch.no_grad():
                found.append({name: score(made, full, made.verdicts(self.model)) for name, (made, full) in self.slices.items()})
            if progress:
                progress(done, len(points))
        return Judged(tuple(found), self.left_out)

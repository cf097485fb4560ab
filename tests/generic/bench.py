"""What the generic checks try methods on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_prism.artefact.open import Opened, open_model
from moe_prism.elastic.bind import Step
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.find import method
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import NamedPoint, OperatingPoint

OPTIONS: dict[str, Any] = {"tokens": 256, "length": 32, "calibration_tokens": 256, "per_method": 3}


@dataclass
class Bench:
    """A refactored model that is tried on, and a text. `points` makes a method's points once."""

    folder: Path
    text: Path
    opened: Opened = field(init=False)
    known: dict[str, list[NamedPoint]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.opened = open_model(self.folder)
        self.subject = subject_of(self.opened, self.options())

    def options(self, **more: Any) -> FrontierOptions:
        return FrontierOptions(text=str(self.text), **OPTIONS, **more)

    def points(self, asked: str) -> list[NamedPoint]:
        if asked not in self.known:
            self.known[asked] = list(method(asked).points(self.subject))
        return self.known[asked]

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, step: Step | Sequence[OperatingPoint]) -> torch.Tensor:
        with self.opened.elastic.at(step):
            return self.opened.model(input_ids=ids).logits

"""Search over the number of experts (DES, arXiv 2509.22572): beams that differ in it write step by step, and a verifier keeps the best.

Beams start at different numbers of experts per token, spread around the model's own. After every step the verifier scores the text of
each, the best stay, and each of those goes on as several, with its parent's number. The answer is the finished text of the best score.
Beams draw, so without a temperature those of one number would be the same. Cost: what every token of every beam reads.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...elastic.bind import Step
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import OperatingPoint, RoutingStage
from .base import Decoded, DecodeMethod, DecodeRun, Steps, refuse_held
from .sequence import Sequence

MOST = 256


@dataclass(frozen=True, kw_only=True)
class DesParameters:
    """beams: that write at once. keep: those that stay after a step. spread: experts per token lie from (1 - spread) k to (1 + spread) k.

    end: what a step ends with. steps: at most.
    """

    beams: int = 8
    keep: int = 2
    spread: float = 0.5
    end: str = "\n"
    steps: int = 64


@dataclass
class Beam:
    """A text that is being written. k: its experts per token. score: the verifier's."""

    sequence: Sequence
    k: int
    step: Step
    score: float = 0.0
    is_over: bool = False

    def child(self) -> Beam:
        """One that goes on from here, at the same number of experts."""
        return Beam(self.sequence.fork(), self.k, self.step, self.score, self.is_over)


class Des(DecodeMethod):
    """`des:BEAMS`, `des:beams=8:keep=2:spread=0.5`."""

    needs = ("a verifier",)
    paper = "arXiv 2509.22572"
    served_by = "generate, serve --decoding"
    neutral: ClassVar[Mapping[str, Any]] = {"beams": 1, "keep": 1, "spread": 0.0}
    Parameters = DesParameters
    parameters: DesParameters

    def __init__(self, name: str, parameters: DesParameters) -> None:
        super().__init__(name, parameters)
        if not 1 <= parameters.keep <= parameters.beams <= MOST:
            raise UsageError(f"{parameters.keep} of {parameters.beams} beams stay", f"give 1 <= keep <= beams <= {MOST}")
        if not 0 <= parameters.spread < 1:
            raise UsageError(
                f"the spread {parameters.spread:g} is outside [0, 1)", "0.5 goes from half of the experts to half as many more"
            )
        if parameters.steps < 1 or not parameters.end:
            raise UsageError("'des' has no steps", "say what a step ends with, and how many there may be")

    @classmethod
    def example(cls) -> str | None:
        return "2"

    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        refuse_held(elastic, point, "des")
        if self.parameters.spread and (elastic.k or 1) == 1:
            raise UsageError("a token of this model has one expert: there is nothing to search over", "give spread=0")

    def numbers(self, k: int, experts: int) -> list[int]:
        """Experts per token of the first beams, evenly spread."""
        asked = self.parameters
        low, high = max(1, math.ceil((1 - asked.spread) * k)), min(experts, math.floor((1 + asked.spread) * k))
        if asked.beams == 1:
            return [k]
        return [round(low + (high - low) * i / (asked.beams - 1)) for i in range(asked.beams)]

    @property
    def sequences(self) -> int:
        return self.parameters.beams

    @property
    def asks_verifier(self) -> bool:
        return self.parameters.beams > 1

    def steps(self, request: DecodeRun) -> Steps:
        asked, elastic = self.parameters, request.elastic
        if request.verifier is None and self.asks_verifier:
            raise UsageError("'des' needs a verifier, which says how good a text is", "give --verifier FILE.py:FUNCTION")
        k, experts = elastic.k or 1, elastic.layers[0].parts.layer.num_experts
        numbers = self.numbers(k, experts)
        steps = {n: request.step(with_experts(elastic, request.point, n)) for n in set(numbers)}
        beams = [Beam(request.sequence(), n, steps[n]) for n in numbers]
        written = cost = 0
        for _ in range(asked.steps):
            for beam in beams:
                tokens = yield from self._extend(request, beam)
                written, cost = written + tokens, cost + tokens * beam.k
            if all(beam.is_over for beam in beams):
                break
            beams = self._next(beams)
        best = max(beams, key=lambda beam: (beam.is_over, beam.score))
        for token in best.sequence.ids[len(request.prompt) :]:
            request.heard(token)
        facts = {
            "experts": best.k,
            "score": best.score,
            "written": written,
            "expert_tokens": cost,
            "forwards": request.spent.forwards,
        }
        return Decoded(best.sequence.ids, facts)

    def _extend(self, request: DecodeRun, beam: Beam) -> Generator[None, None, int]:
        """Write one step; how many tokens it has."""
        if beam.is_over:
            return 0
        sequence, begin = beam.sequence, len(beam.sequence.ids)
        yield from request.read(sequence, beam.step)
        while True:
            sequence.ids.append(request.draw(sequence.ids, sequence.forward(beam.step)[-1]))
            beam.is_over = request.is_over(sequence.ids)
            if beam.is_over or request.text(sequence.ids[-1:]).endswith(self.parameters.end):
                break
            yield
        if request.verifier is not None:
            beam.score = float(request.verifier(request.text(request.prompt), request.text(sequence.ids[len(request.prompt) :])))
        return len(sequence.ids) - begin

    def _next(self, beams: list[Beam]) -> list[Beam]:
        """The best, and their children where they are not finished. Equal scores stay in order, so different numbers stay."""
        asked = self.parameters
        kept = sorted(beams, key=lambda beam: -beam.score)[: asked.keep]
        found: list[Beam] = []
        for i, beam in enumerate(kept):
            copies = 1 if beam.is_over else asked.beams // asked.keep + (i < asked.beams % asked.keep)
            found += [beam, *(beam.child() for _ in range(copies - 1))]
        return found


def with_experts(elastic: Elastic, point: OperatingPoint, n: int) -> OperatingPoint:
    """The point with n experts per token, which may be more than the router's k: then the next by its probability."""
    k, layers = elastic.k or 1, len(elastic.layers)
    if n == k:
        return point
    stage = (
        RoutingStage(layers=(n,) * layers)
        if n < k
        else RoutingStage(
            layers=(n,) * layers, stage="top-p", parameters={"p": ((2.0,),) * layers}, keep_mass=elastic.normalises()
        )
    )
    return replace(point, routing=(*point.routing, stage))

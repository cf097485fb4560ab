"""Early stopping of reasoning (ConCISE, arXiv 2505.04881): at the end of a step, ask whether the model is done, and close if it is sure.

A probe is put behind the text on a copy of the cache, and the probability of words of confidence is compared with that of words of doubt.
Above the threshold the closing text follows, and then the model ends its answer by itself. The sequence never sees a probe. The paper's
gains come from training on text made so; this is the rule alone. Its other rule, a phrase of confidence before a doubt, is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...elastic.bind import Step
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import OperatingPoint
from .base import Decoded, DecodeMethod, DecodeRun, Steps, refuse_held
from .sequence import Sequence

NEVER = 2.0


@dataclass(frozen=True, kw_only=True)
class ConciseParameters:
    """threshold: share of confidence above which it stops; above 1: never. end: what a step ends with. probe: what is asked behind it.

    sure, unsure: words of confidence and of doubt, with commas between; of each the first token counts. close: what follows when it stops.
    """

    threshold: float = 0.5
    end: str = "\n"
    probe: str = ""
    sure: str = ""
    unsure: str = ""
    close: str = ""


class Concise(DecodeMethod):
    """`concise:THRESHOLD`, `concise:threshold=0.5:probe=So the answer is:sure=clear:unsure=wait`."""

    needs = ("words of confidence and of doubt",)
    paper = "arXiv 2505.04881"
    served_by = "generate, serve --decoding"
    neutral: ClassVar[Mapping[str, Any]] = {"threshold": NEVER, "sure": "a", "unsure": "b"}
    Parameters = ConciseParameters
    parameters: ConciseParameters

    def __init__(self, name: str, parameters: ConciseParameters) -> None:
        super().__init__(name, parameters)
        if not parameters.threshold >= 0:
            raise UsageError(f"a threshold of {parameters.threshold:g}", "give 0 to 1, or more to stop nowhere")

    @classmethod
    def example(cls) -> str | None:
        return "threshold=0.5:sure=x:unsure=y"

    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        refuse_held(elastic, point, "concise")
        for what in ("end", "sure", "unsure"):
            if not getattr(self.parameters, what):
                raise UsageError(f"'concise' was not told '{what}'", "write such as concise:threshold=0.5:sure=clear:unsure=wait")

    @property
    def sequences(self) -> int:
        return 2  # the probe is put behind a copy

    def steps(self, request: DecodeRun) -> Steps:
        asked, own, sequence = self.parameters, request.step(), request.sequence()
        yield from request.read(sequence, own)
        probe, close = (request.tokens(text) for text in (asked.probe, asked.close))
        sure, unsure = (self._firsts(request, words) for words in (asked.sure, asked.unsure))
        probes, stopped_at, forced = 0, None, list[int]()
        while True:
            logits = sequence.forward(own)[-1]
            token = request.take(sequence, logits, forced.pop(0) if forced else None)
            if request.is_over(sequence.ids):
                return Decoded(sequence.ids, {"probes": probes, "stopped_at": stopped_at, "forwards": request.spent.forwards})
            if stopped_at is None and asked.threshold <= 1 and request.text([token]).endswith(asked.end):
                probes += 1
                if confidence(sequence, own, probe, sure, unsure) > asked.threshold:
                    stopped_at, forced = len(sequence.ids) - len(request.prompt), list(close)
            yield

    @staticmethod
    def _firsts(request: DecodeRun, words: str) -> list[int]:
        return [request.tokens(word)[0] for word in words.split(",") if word]


def confidence(sequence: Sequence, step: Step, probe: list[int], sure: list[int], unsure: list[int]) -> float:
    """Probability of words of confidence as a share of theirs and that of words of doubt, behind the probe. The sequence stays as it is."""
    copy = sequence.fork()
    copy.ids += probe
    p = copy.forward(step)[-1].softmax(-1)
    high, low = (float(p[torch.tensor(ids, device=p.device)].sum()) for ids in (sure, unsure))
    return high / (high + low) if high + low > 0 else 0.0

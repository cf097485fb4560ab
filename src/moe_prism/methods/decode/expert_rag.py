"""A gate before retrieval (after ExpertRAG, arXiv 2504.08744, which is theory): ask for text only where the router is unsure.

The prompt runs once. Where the mean entropy of its routers, as a share of what even routing has, is above the threshold, the caller's
retriever is asked, and what it gives stands before the prompt. The expected cost of a request is then what the model costs, plus the
rate of retrieval times what a retrieval costs, its tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...elastic.layer import ElasticLayer
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import OperatingPoint
from .base import Decoded, DecodeMethod, DecodeRun, Steps, refuse_held


@dataclass(frozen=True, kw_only=True)
class ExpertRagParameters:
    """threshold: share of the entropy of even routing, 0 to 1, above which text is retrieved; 1: never."""

    threshold: float = 0.8


class ExpertRag(DecodeMethod):
    """`expert-rag:THRESHOLD`."""

    needs = ("a retriever",)
    paper = "arXiv 2504.08744"
    neutral: ClassVar[Mapping[str, Any]] = {"threshold": 1.0}
    Parameters = ExpertRagParameters
    parameters: ExpertRagParameters

    def __init__(self, name: str, parameters: ExpertRagParameters) -> None:
        super().__init__(name, parameters)
        if not 0 <= parameters.threshold <= 1:
            raise UsageError(f"a threshold of {parameters.threshold:g}", "give a share from 0 to 1; 1 never retrieves")

    @classmethod
    def example(cls) -> str | None:
        return "0.5"

    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        refuse_held(elastic, point, "expert-rag")

    def steps(self, request: DecodeRun) -> Steps:
        own, sequence = request.step(), request.sequence()
        with router_entropy(request.elastic) as seen:
            logits = sequence.forward(own)[-1]
        entropy = sum(seen) / len(seen)
        retrieved = entropy > self.parameters.threshold
        if retrieved:
            if request.retriever is None:
                raise UsageError("'expert-rag' needs a retriever", "give --retriever FILE.py:FUNCTION, or a threshold of 1")
            found = request.tokens(request.retriever(request.text(request.prompt)))
            sequence = request.sequence([*found, *request.prompt])
            logits = sequence.forward(own)[-1]
        before = len(sequence.ids) - len(request.prompt)
        while True:
            request.take(sequence, logits)
            ids = sequence.ids[before:]
            if request.is_over(ids):
                facts = {
                    "entropy": round(entropy, 6),
                    "retrieved": retrieved,
                    "added": before,
                    "forwards": request.spent.forwards,
                }
                return Decoded(ids, facts)
            yield
            logits = sequence.forward(own)[-1]


@contextmanager
def router_entropy(elastic: Elastic) -> Iterator[list[float]]:
    """Inside the block every layer's call adds the mean entropy of its routing probabilities, as a share of log E."""
    seen: list[float] = []

    def watching(layer: ElasticLayer) -> Any:
        def call(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            seen.append(entropy_share(layer.router_scores(x, index, weight)))
            return layer(x, index, weight)

        return call

    try:
        for layer in elastic.layers:
            layer.parts.layer.install(watching(layer))
        yield seen
    finally:
        for layer in elastic.layers:
            layer.parts.layer.install(layer)


def entropy_share(scores: Tensor) -> float:
    """Mean entropy of rows of scores [T, E], made to sum up to 1, over log E."""
    p = scores / scores.sum(1, keepdim=True)
    return float((-(p * p.clamp(min=1e-12).log()).sum(1)).mean()) / math.log(max(2, p.shape[1]))


def expected_cost(experts: float, rate: float, retrieval: float) -> float:
    """Of a request: what the model costs, the share of requests that retrieve, what a retrieval costs; of any one unit."""
    return experts + rate * retrieval

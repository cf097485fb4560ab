"""Which experts each task needs, in one small file, and which stored task a prompt is nearest to (PreMoE, arXiv 2505.17639).

Shapes: L layers, E experts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calibrate.confidence import threshold, utility
from ...calibrate.statistics import Statistics
from ...compress.prune import PruneRequest, choose
from ...compress.prune.change import PruneChange
from ...errors import CorruptError, UsageError
from ...model.router import Router
from ...point import NamedPoint, OperatingPoint
from ...schema import read_form
from ...schema.patterns import AGAIN, PatternsForm
from ..merge.base import RoutedLayer


@dataclass(frozen=True)
class Patterns:
    """experts of every layer; least: what `utility` counts from on in the first layer; scores: of every task, [E] of every layer."""

    experts: tuple[int, ...]
    least: float
    scores: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def of(cls, statistics: Statistics) -> Patterns:
        """From a calibration of several domains. UsageError where it says nothing of any."""
        layers = statistics.layers
        tasks = [name for name, own in layers[0].domains.items() if "confidence" in own]
        if not tasks:
            raise UsageError(
                "the calibration holds no 'confidence' by domain",
                "calibrate with --collectors confidence --domain NAME=PATH once per domain",
            )
        least = [threshold(layer.values["confidence"]) for layer in layers]
        scores = {
            name: tuple(utility(layer.domains[name]["confidence"], own) for layer, own in zip(layers, least, strict=True))
            for name in tasks
        }
        return cls(tuple(len(own) for own in scores[tasks[0]]), least[0], scores)

    def encoded(self) -> bytes:
        """The file: two bytes for every task, layer and expert."""
        rows = {
            name: [base64.b64encode(own.numpy().astype("<f2").tobytes()).decode() for own in scores]
            for name, scores in self.scores.items()
        }
        facts = {"kind": "patterns", "experts": list(self.experts), "least": self.least, "tasks": rows}
        return json.dumps(facts, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, path: str | Path) -> Patterns:
        """CorruptError for a file that is none."""
        form = read_form(PatternsForm, Path(path), AGAIN)
        scores = {}
        for name, rows in form.tasks.items():
            try:
                data = [base64.b64decode(row, validate=True) for row in rows]
            except ValueError as error:
                raise CorruptError(f"{path}: the scores of '{name}' are no base64", AGAIN) from error
            if [len(own) for own in data] != [2 * experts for experts in form.experts]:
                raise CorruptError(f"{path}: the scores of '{name}' are not those of {form.experts} experts", AGAIN)
            scores[name] = tuple(torch.from_numpy(np.frombuffer(own, "<f2").astype(np.float64)) for own in data)
            if not all(torch.isfinite(own).all() for own in scores[name]):
                raise CorruptError(f"{path}: a score of '{name}' is not finite", AGAIN)
        return cls(tuple(form.experts), form.least, scores)

    def nearest(self, query: Tensor) -> str:
        """The task whose scores in the first layer are nearest to those of a prompt [E]."""
        return min(self.scores, key=lambda name: (float((self.scores[name][0] - query).norm()), name))

    @torch.no_grad()
    def query(self, model: Any, layer: RoutedLayer, ids: Tensor) -> Tensor:
        """[E] (float64): the scores of a prompt, ids [n, length], in the first layer. It runs through the model as it is now.

        UsageError for a model whose router's scores are not seen.
        """
        with Router(model, layer.layer).watched() as scores:
            model(input_ids=ids, use_cache=False)
            z = scores()
        if z is None:
            raise UsageError(f"the router scores of '{layer.layer.name}' were not seen", "name the task yourself")
        best = z[:, : layer.layer.num_experts].double().cpu().topk(layer.per_token, 1)
        value = torch.maximum(best.values, best.values.sigmoid()) * (best.values.softmax(1) >= self.least)
        return torch.zeros(layer.layer.num_experts, dtype=torch.float64).index_add_(
            0, best.indices.flatten(), value.flatten()
        ) / len(z)

    def point(self, task: str, layers: Sequence[RoutedLayer], keep: float) -> NamedPoint:
        """The model with the experts that a task needs most, as many in every layer. UsageError for a task that there is not."""
        if task not in self.scores:
            raise UsageError(f"there is no pattern of '{task}'", f"choose one of: {', '.join(self.scores)}")
        if [own.layer.num_experts for own in layers] != list(self.experts):
            raise UsageError("the patterns are of a model with other experts", AGAIN)
        free = [torch.zeros(experts, dtype=torch.bool) for experts in self.experts]
        groups = [own.groups for own in layers]
        kept = choose(self.scores[task], PruneRequest(keep), layers[0].per_token, free, groups)
        return NamedPoint(name=f"premoe-{task}-{keep:g}", point=OperatingPoint(weights=PruneChange(tuple(kept)).part()))

"""Record a trace: run windows of text through a model and keep what every MoE layer was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..elastic import Slots
from ..elastic.layer import ElasticLayer
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..model import MoELayer, find_layers
from ..model.base import is_expert
from ..model.scores import router_weight
from .trace import DECODE, FORMAT, PREFILL, SIDES, Trace

BATCH = 4  # windows per forward


class TraceRecorder:
    """Installed on all MoE layers between `with`; the model's output is what it would be without.

    values: also the value of every candidate slot (elastic models); inputs: also the routers' inputs and weights.
    """

    def __init__(self, model: Any, *, values: bool = False, inputs: bool = False) -> None:
        elastic = getattr(model, "_moe_prism", None)
        self.model, self.inputs = model, inputs
        self.inner: list[ElasticLayer | None] = list(elastic.layers) if elastic else []
        self.layers: list[MoELayer] = [e.parts.layer for e in elastic.layers] if elastic else find_layers(model, dense=False)
        self.inner = self.inner or [None] * len(self.layers)
        if values and not elastic:
            raise UsageError("slot values need an elastic model", "give a folder written by `moe-prism refactor`")
        self.values = values
        self._rows: list[dict[str, list[Tensor]]] = [{} for _ in self.layers]

    def __enter__(self) -> TraceRecorder:
        for number, layer in enumerate(self.layers):
            layer.install(self._observer(number))
        return self

    def __exit__(self, *_: object) -> None:
        for layer, inner in zip(self.layers, self.inner, strict=True):
            layer.uninstall()
            if inner is not None:
                inner.on_kept = None
                layer.install(inner)

    def _observer(self, number: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        layer, inner, rows = self.layers[number], self.inner[number], self._rows[number]

        def keep(name: str, tensor: Tensor) -> None:
            rows.setdefault(name, []).append(tensor.detach().cpu())

        if inner is not None:
            inner.on_kept = lambda chosen, kept: keep("kept", _bits(_all(inner, chosen) if kept is None else kept))

        def observe(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            valid = is_expert(index, layer.num_experts)
            keep("expert_ids", index.masked_fill(~valid, -1).to(torch.int16))
            keep("weights", (weight * valid).half())
            if self.inputs:
                keep("inputs", x.half())
            if inner is not None and self.values:
                keep("values", self._values(inner, x, index, weight, valid).half())
            return layer.native(x, index, weight) if inner is None else inner(x, index, weight)

        return observe

    def _values(self, inner: ElasticLayer, x: Tensor, index: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
        scorer = inner.scorer(inner.elastic.step.bound.groups[0].scorer)
        slots = Slots(
            x, index, weight, valid, inner.parts.n_sub, lambda: scorer(x, index.clamp(0, inner.parts.layer.num_experts - 1))
        )
        return slots.values()

    def arrays(self) -> dict[str, Any]:
        """Everything seen so far, layers stacked: name -> [T, L, ...]."""
        names = self._rows[0]
        found = {n: torch.stack([torch.cat(rows[n]) for rows in self._rows], dim=1).numpy() for n in names}
        if "kept" in found:
            found["kept"] = found["kept"].astype(_smallest(self.n_sub))
        if self.inputs:
            routers = torch.stack([router_weight(self.model, layer) for layer in self.layers]).float().cpu()
            found["routers"] = routers.numpy()
            scores = [torch.from_numpy(found["inputs"][:, i]).float() @ routers[i].T for i in range(len(self.layers))]
            found["logits"] = torch.stack(scores, dim=1).half().numpy()
        return found

    def taken(self) -> dict[str, Any]:
        """`arrays` of what was seen since the last call; empty where there was nothing, or a forward that did not reach all layers."""
        whole = all(rows.keys() == self._rows[0].keys() and rows for rows in self._rows)
        try:
            return self.arrays() if whole else {}
        finally:
            for rows in self._rows:
                rows.clear()

    @property
    def n_sub(self) -> int:
        return self.inner[0].parts.n_sub if self.inner[0] is not None else 1


@torch.no_grad()
def record(
    recorder: TraceRecorder,
    windows: Sequence[tuple[str, Tensor]],
    *,
    prompt: int,
    header: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """The trace of windows, each (side, ids [n, length]): every row is a request whose first `prompt` tokens are one prefill step and
    whose other tokens are decode steps.

    The text itself stands for what the model generates: routing at a position depends on the tokens before it only, so one pass over
    the window records what decoding these tokens would. Runs at the model's current operating point.
    """
    model = recorder.model
    total = sum(len(ids) for _, ids in windows)
    done = 0
    with recorder:
        for _, ids in windows:
            for start in range(0, len(ids), BATCH):
                rows = ids[start : start + BATCH]
                model(input_ids=rows.to(model.device), use_cache=False)
                done += len(rows)
                if progress:
                    progress(done, total)
    layer = recorder.layers[0]
    facts = {
        "format": FORMAT,
        "layers": len(recorder.layers),
        "experts": max(each.num_experts for each in recorder.layers),
        "k": experts_per_token(model, layer),
        "n_sub": recorder.n_sub,
        **(header or {}),
    }
    arrays = recorder.arrays()
    facts["k"] = int(arrays["expert_ids"].shape[2])
    return Trace(facts, **arrays, **_when(windows, prompt))


def _when(windows: Sequence[tuple[str, Tensor]], prompt: int) -> dict[str, Any]:
    """request, position, phase, step, side and token of every row."""
    parts: dict[str, list[Any]] = {name: [] for name in ("request", "position", "phase", "step", "side", "token")}
    request = step = 0
    for side, ids in windows:
        length = ids.shape[1]
        first = min(prompt, length)
        position = np.arange(length)
        for row in ids.numpy():
            parts["request"].append(np.full(length, request))
            parts["position"].append(position)
            parts["phase"].append(np.where(position < first, PREFILL, DECODE))
            # the prompt is one step (none if it is empty), every further token one more
            steps = np.maximum(position - max(first, 1) + 1, 0)
            parts["step"].append(step + steps)
            parts["side"].append(np.full(length, SIDES.index(side)))
            parts["token"].append(row)
            request, step = request + 1, step + int(steps[-1]) + 1
    small = {"phase": np.int8, "side": np.int8}
    return {name: np.concatenate(rows).astype(small.get(name, np.int32)) for name, rows in parts.items()}


def _all(layer: ElasticLayer, index: Tensor) -> Tensor:
    """keep [T, k, N] where every block is kept."""
    return is_expert(index, layer.parts.layer.num_experts)[:, :, None].expand(-1, -1, layer.parts.n_sub)


def _bits(keep: Tensor) -> Tensor:
    """keep [T, k, N] bool -> int64 [T, k], bit n = block n."""
    return (keep.long() << torch.arange(keep.shape[2], device=keep.device)).sum(2)


def _smallest(bits: int) -> Any:
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32

"""Collectors inside vLLM's workers: they see what its experts are called with, and their statistics come home by `collective_rpc`.

A worker has this class among its own (`worker_extension_cls`), and vLLM imports it before it has started: nothing that compiles with numba
may be imported at the top (see `worker.py`). All workers of tensor and expert parallelism see every token's input and choice, so the first
one's statistics are those of the model; with pipeline parallelism each worker has its layers.
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

from . import compat

EXTENSION = f"{__name__}.CollectingWorker"
DECODER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""The number of a decoder layer in the name of a module of it, here and in transformers."""


class _Watch:
    """The collectors of one MoE layer, and the window that it has still to see."""

    def __init__(self, layer: Any, asked: dict[str, Any]) -> None:
        from ...calibrate import collectors

        self.layer, self.length = layer, int(asked["length"])
        self.collectors = {
            key: collectors.get(key.rpartition("/")[2])(layer, capacity=asked["capacity"], seed=asked["seed"])
            for key in asked["keys"]
        }
        self.first: int | None = None
        self.domain = ""

    def see(self, x: Any, index: Any, weight: Any) -> None:
        """x [T, d], index and weight [T, k] of a step. A step after the window's own, which vLLM may run ahead, is not looked at."""
        from ...calibrate import RoutedBatch
        from ...errors import CorruptError, UsageError

        if self.first is None:
            return
        if len(x) != self.length:
            raise UsageError(f"vLLM ran {len(x)} of a window's {self.length} tokens in a step", "give it larger steps")
        x = x.detach()
        if not bool(x.isfinite().all()):
            raise CorruptError(f"non-finite input at '{self.layer.name}'", "the weights or the text are damaged")
        batch = RoutedBatch(x, index.long(), weight.detach().float(), self.first, self.length)
        for key, collector in self.collectors.items():
            if key.rpartition("/")[0] in ("", self.domain):
                collector.update(batch)
        self.first = None


class CollectingWorker:
    """Mixed into vLLM's worker."""

    def moe_prism_begin(self, asked: str) -> list[int]:
        """Watch the MoE layers from now on, as JSON says; the numbers of those that this worker has."""
        said = json.loads(asked)
        found: dict[int, _Watch] = {}
        for name, module in self.model_runner.get_model().named_modules():  # type: ignore[attr-defined]
            if isinstance(module, compat.name("MoERunner")) and (place := DECODER.search(name)):
                facts = said["layers"].get(place[1])
                if facts is not None:
                    watch = found[facts["index"]] = _Watch(SimpleNamespace(**facts), said)
                    _watched(module.routed_experts, watch)
        self.moe_prism_watches = found
        return sorted(found)

    def moe_prism_window(self, first: int, domain: str) -> list[int]:
        """The next step is a window whose first token has this number in all of the text. Layers that have not seen the one before."""
        missed = [number for number, watch in self.moe_prism_watches.items() if watch.first is not None]
        for watch in self.moe_prism_watches.values():
            watch.first, watch.domain = (first if first >= 0 else None), domain
        return missed

    def moe_prism_statistics(self, number: int) -> bytes:
        """What the collectors of a layer have gathered, as safetensors; nothing where another worker has it, or has the same."""
        from safetensors.torch import save

        watch = self.moe_prism_watches.get(number)
        if watch is None or compat.name("get_tp_group")().rank_in_group:
            return b""
        return bytes(
            save({f"{key}.{k}": v.contiguous() for key, own in watch.collectors.items() for k, v in own.state().items()})
        )


def _watched(experts: Any, watch: _Watch) -> None:
    """Have a watch see every call of these experts."""
    stock = type(experts)

    def forward_modular(self: Any, x: Any, topk_weights: Any, topk_ids: Any, *more: Any, **named: Any) -> Any:
        watch.see(x, topk_ids, topk_weights)
        return stock.forward_modular(self, x, topk_weights, topk_ids, *more, **named)

    experts.__class__ = type("WatchedExperts", (stock,), {"forward_modular": forward_modular})

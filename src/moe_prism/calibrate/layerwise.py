"""The pass, a decoder layer at a time: every weight is read once, and the statistics of one layer are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..checkpoint import LayerStream
from ..checkpoint.layerwise import Forward, run_layerwise
from ..errors import UsageError
from ..model import MoELayer
from .run import Batch, Pass, Settings, backbone_of, batches, bounded_capacity, profile_windows

WHOLE = "'gradients' come from a backward pass through the whole model"


class LayerwisePass(Pass):
    """A pass that hands over the statistics of a layer as soon as all text has been through it.

    together: the sample is as small as the memory limit wants it for all layers at once, else for one.
    """

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], settings: Settings, *, together: bool) -> None:
        if settings.goes_back:
            raise UsageError(WHOLE, "leave --low-memory out, or choose what reads no gradients")
        self.stream, self.model, self.layers, self.settings = stream, stream.model, layers, settings
        largest = max(layers, key=lambda layer: layer.num_experts * layer.hidden)
        self.capacity = bounded_capacity(layers if together else [largest], settings)
        self.collectors = [{} for _ in layers]
        self.done, self.domain = 0, ""

    def run_layers(
        self,
        ids: Tensor,
        finish: Callable[[int], None],
        *,
        parts: Sequence[tuple[str, int]] = (),
        span: tuple[int, int] | None = None,
        known: Callable[[int], bool] = lambda _: False,
        others: Sequence[Forward] = (),
        after: Callable[[str, Sequence[int], Callable[[int], None]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """ids [n, length], parts and span as `run` has them. finish(i): MoE layer i has seen all text; its weights are there, and
        `gathered(i)` too.

        known(i): nothing is to be gathered for it. others: forwards that pass every layer after that, under after(layer, its MoE layers,
        pass_through).
        """
        texts = list(batches(ids, self.settings.batch, parts, *(span or ())))
        self.profile = profile_windows(ids)
        names, inside = self.stream.layer_names(), self._inside()

        def visit(name: str, go: Callable[[int], None]) -> None:
            wanted = [i for i in inside[name] if not known(i)]
            for i in wanted:
                self.collectors[i] = self.fresh(self.layers[i])
            with self.watched(wanted, ids.shape[1]):
                for number, batch in enumerate(texts):
                    self.done, self.domain = batch.first, batch.domain
                    go(number)
            self.done = len(ids)
            for i in inside[name]:
                finish(i)
                self.collectors[i] = {}
            if after:
                after(name, inside[name], lambda number: go(len(texts) + number))
            if progress:
                progress(names.index(name) + 1, len(names))

        if not texts and not others:  # an empty part of a text: no layer would be visited
            self.done, self.collectors = len(ids), [self.fresh(layer) for layer in self.layers]
            for i in range(len(self.layers)):
                finish(i)
            return
        run_layerwise(self.stream, [*(partial(_through, batch) for batch in texts), *others], visit)

    def _inside(self) -> dict[str, list[int]]:
        """Numbers of the MoE layers in every decoder layer."""
        found: dict[str, list[int]] = {name: [] for name in self.stream.layer_names()}
        for number, layer in enumerate(self.layers):
            owner = next(name for name in found if layer.name.startswith(f"{name}."))
            found[owner].append(number)
        return found


def _through(batch: Batch, model: Any) -> None:
    backbone_of(model)(input_ids=batch.ids, use_cache=False)

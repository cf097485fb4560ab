"""Sum the normal equations of several layers in one pass of the full model over calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..calibrate.run import Progress, backbone_of, input_device
from ..calibrate.tokens import SKIPPED_POSITIONS
from ..elastic import Elastic
from ..elastic.bind import Step, bind
from ..elastic.layer import ElasticLayer
from ..elastic.side_tensors import REPAIR
from ..errors import CorruptError, DoesNotFit
from ..point import FULL
from .base import RecoverJob
from .repair import Normal

BUDGETS = (0.75, 0.5, 0.25)  # of the default rule, where the equations see what is kept; alike
BATCH = 5  # windows, the last of which is held out


def groups(layers: Sequence[ElasticLayer], bands: int, memory_bytes: int) -> list[list[int]]:
    """Neighbouring layers whose equations fit in memory together, so that each group takes one pass.

    Raises DoesNotFit if one layer alone does not fit.
    """
    found: list[list[int]] = []
    held = 0
    for i, layer in enumerate(layers):
        size = Normal.bytes(layer.parts, bands)
        if size > memory_bytes:
            raise DoesNotFit(
                f"the equations of one layer need {size / 2**20:.0f} MiB, the limit is {memory_bytes / 2**20:.0f} MiB",
                "raise --memory-mib, or lower --bands",
            )
        held += size
        if not found or held > memory_bytes:
            found, held = [*found, []], size
        found[-1].append(i)
    return found


class _Reached(Exception):
    """The last layer of the group has seen its batch: what follows is not needed."""


@torch.no_grad()
def equations(
    model: Any, elastic: Elastic, group: Sequence[int], ids: Tensor, bands: int, progress: Progress | None = None
) -> list[Normal]:
    """One Normal per layer of `group`, over windows ids [n, length]. Inputs are those of the full model."""
    found = [Normal(elastic.layers[i].parts, bands) for i in group]
    try:
        for i, normal in zip(group, found, strict=True):
            layer = elastic.layers[i]
            layer.parts.layer.install(_observer(layer, normal, ids.shape[1], last=i == group[-1]))
        backbone, device = backbone_of(model), input_device(model)
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            with suppress(_Reached):
                backbone(input_ids=batch.to(device), use_cache=False)
            if progress:
                progress(start + len(batch), len(ids))
    finally:
        for i in group:
            elastic.layers[i].parts.layer.install(elastic.layers[i])
    return found


def _observer(layer: ElasticLayer, normal: Normal, window: int, *, last: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    steps = [Step(bind(layer.elastic, [FULL.with_slots(budget)])) for budget in BUDGETS]

    def observe(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise CorruptError(
                f"non-finite input at '{layer.parts.layer.name}'", "the weights or the text are damaged; run `moe-prism verify`"
            )
        number = torch.arange(len(x), device=x.device)
        # the first token of a window has massive activations that say nothing about the others
        usable = number % window >= SKIPPED_POSITIONS
        for held in (False, True):
            rows = usable & ((number // window == BATCH - 1) == held)
            if rows.any():
                mine = x[rows], index[rows], weight[rows]
                normal.add(*mine, [layer.kept(step, *mine) for step in steps], held=held)
        if last:
            raise _Reached
        return layer.parts.layer.native(x, index, weight)

    return observe


def repair(job: RecoverJob) -> dict[str, Any]:
    """The method: groups of layers, one pass each; a layer is saved when its group has been summed."""
    layers = job.elastic.layers
    bands = min(job.bands, layers[0].parts.n_sub - 1)
    parts = groups(layers, bands, job.memory_bytes)
    with job.report("repair") as update:
        for number, group in enumerate(parts):
            todo = [i for i in group if not job.done(i)]
            if not todo:
                continue

            def progress(done: int, windows: int, before: int = number) -> None:
                update(before * windows + done, len(parts) * windows)

            for i, normal in zip(todo, equations(job.model, job.elastic, todo, job.ids, bands, progress), strict=True):
                job.save(i, {REPAIR: normal.solve()})
    return {"bands": bands, "budgets": list(BUDGETS)}

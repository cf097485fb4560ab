"""Choose how a model in memory computes its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_prism.elastic import Elastic
from moe_prism.elastic.execute.memory import check_way


@contextmanager
def computed(elastic: Elastic, way: str) -> Iterator[None]:
    """Every layer computes in this way (a name of `execute.memory.WAYS`) inside the block."""
    before = [layer.executor.way for layer in elastic.layers]
    try:
        for layer in elastic.layers:
            layer.executor.way = check_way(way)
        yield
    finally:
        for layer, name in zip(elastic.layers, before, strict=True):
            layer.executor.way = name

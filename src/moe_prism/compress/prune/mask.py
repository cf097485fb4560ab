"""Mask mode: run a model as if experts had been removed, without touching its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ...model import MoELayer, find_layers
from ...model.router import find_routers
from .choice import KeptExperts
from .constants import substituted


@contextmanager
def pruned(model: Any, choices: Sequence[KeptExperts], layers: Sequence[MoELayer] | None = None) -> Iterator[None]:
    """Route among the kept experts of every layer inside the block; the model is as it was after it.

    The router's rows are sliced as removal slices them, so the family's own normalisation, selection bias and groups apply, and the
    logits are those of the removed model. A layer that keeps everything is not touched. Works under elastic execution as well: only
    which experts are chosen changes. UsageError for a router in an unknown form. Where constants take the place of experts, the router
    stays as it is.
    """
    changed = [pair for pair in zip(_layers(model) if layers is None else layers, choices, strict=True) if not pair[1].is_full]
    with ExitStack() as stack:
        for layer, choice in changed:
            if choice.constants is not None:
                stack.enter_context(substituted(layer, choice.kept, choice.gone, choice.constants))
                continue
            (router,) = find_routers(model, [layer])
            stack.enter_context(router.masked(choice.kept) if choice.masked else router.sliced(choice.kept, choice.groups))
        yield


def _layers(model: Any) -> Sequence[MoELayer]:
    """Those that an elastic model runs, else new ones."""
    elastic = getattr(model, "_moe_prism", None)
    return [layer.parts.layer for layer in elastic.layers] if elastic else find_layers(model)

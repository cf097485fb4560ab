"""Find the MoE layers of any transformers model."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from ..errors import UsageError
from .base import MoELayer, check_formula
from .dense import DenseLayer, dense_names
from .fused import FusedLayer, is_fused

EXPECTED = "expected experts behind transformers' experts interface (gate_up_proj or up_proj, down_proj as 3-D tensors)"


def find_layers(model: nn.Module, *, dense: bool | None = None) -> list[MoELayer]:
    """All MoE layers of a model in module order, each checked against the module's own forward.

    dense: True = take dense MLPs (E=1) instead, False = never, None = only if the model has no experts at all.
    Raises UsageError naming the module when experts are stored in a way that is not understood, or nothing is found.
    """
    layers = [] if dense else _collect(model, is_fused, FusedLayer)
    if not layers and not dense:
        strange = [(n, m) for n, m in model.named_modules() if _looks_like_experts(m) and not is_fused(m)]
        if strange:
            name, module = strange[0]
            raise UsageError(f"module '{name}' ({type(module).__name__}) holds experts in an unknown form", EXPECTED)
    if not layers and dense is not False:
        layers = _collect(model, lambda m: dense_names(m) is not None, DenseLayer)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no MoE layer" + ("" if dense is False else " and no dense MLP that could be split"),
            EXPECTED,
        )
    for layer in layers:
        problem = check_formula(layer, f"module '{layer.name}' ({type(layer.module).__name__})")
        if problem:
            raise UsageError(problem, EXPECTED)
    return layers


def _collect(
    model: nn.Module, test: Callable[[nn.Module], bool], make: Callable[[str, nn.Module, int], MoELayer]
) -> list[MoELayer]:
    found = [(name, module) for name, module in model.named_modules() if test(module)]
    return [make(name, module, index) for index, (name, module) in enumerate(found)]


def _looks_like_experts(module: nn.Module) -> bool:
    """Several 3-D parameters, a list of MLPs called experts, or a class that is named so."""
    if sum(p.ndim == 3 for p in module.parameters(recurse=False)) >= 2:
        return True
    experts = getattr(module, "experts", None)
    if isinstance(experts, nn.ModuleList | nn.ModuleDict) and len(experts) > 1:
        return True
    return re.search(r"Expert|MoE$|Moe$|MoeBlock$", type(module).__name__) is not None

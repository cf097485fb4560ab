"""Find the MoE layers of any transformers model."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from ..errors import UsageError
from .base import MoELayer, check_formula
from .dense import DenseLayer, dense_names
from .fused import FusedLayer, is_fused
from .parallel import ParallelLayer, is_parallel
from .plain import FlatLayer, PlainLayer, is_flat, is_plain
from .scaled_input import ScaledInputLayer, is_scaled_input
from .separate import SeparateLayer, is_separate

EXPECTED = "expected experts behind transformers' experts interface (3-D tensors), or in a form of docs/families.md"
Make = Callable[[str, nn.Module, int], MoELayer]
FORMS: tuple[tuple[Callable[[nn.Module], bool], Make], ...] = (
    (is_fused, FusedLayer),
    (is_plain, PlainLayer),
    (is_flat, FlatLayer),
    (is_parallel, ParallelLayer),
    (is_scaled_input, ScaledInputLayer),
    (is_separate, SeparateLayer),
)
"""How experts can be stored and called: the test of a module, and the layer it makes."""


def find_layers(model: nn.Module, *, dense: bool | None = None) -> list[MoELayer]:
    """All MoE layers of a model in module order, each checked against the module's own forward.

    dense: True = take dense MLPs (E=1) instead, False = never, None = only if the model has no experts at all.
    Raises UsageError naming the module when experts are stored in a way that is not understood, or nothing is found.
    """
    layers = [] if dense else _collect(model, _form)
    if not layers and not dense:
        strange = [(n, m) for n, m in model.named_modules() if _looks_like_experts(m)]
        if strange:
            name, module = strange[0]
            raise UsageError(f"module '{name}' ({type(module).__name__}) holds experts in an unknown form", EXPECTED)
    if not layers and dense is not False:
        layers = _collect(model, lambda m: DenseLayer if dense_names(m) is not None else None)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no MoE layer" + ("" if dense is False else " and no dense MLP that could be split"),
            EXPECTED,
        )
    for layer in layers:
        problem = check_formula(model, layer, f"module '{layer.name}' ({type(layer.module).__name__})")
        if problem:
            raise UsageError(problem, EXPECTED)
    return layers


def _collect(model: nn.Module, form: Callable[[nn.Module], Make | None]) -> list[MoELayer]:
    layers: list[MoELayer] = []
    for name, module in model.named_modules():
        make = form(module)
        if make is not None:
            layers.append(make(name, module, len(layers)))
    return layers


def _form(module: nn.Module) -> Make | None:
    return next((make for test, make in FORMS if test(module)), None)


def _looks_like_experts(module: nn.Module) -> bool:
    """Several 3-D parameters, a list of MLPs called experts, or a class that is named so."""
    if sum(p.ndim == 3 for p in module.parameters(recurse=False)) >= 2:
        return True
    experts = getattr(module, "experts", None)
    if isinstance(experts, nn.ModuleList | nn.ModuleDict) and len(experts) > 1:
        return True
    return re.search(r"Expert|MoE$|Moe$|MoeBlock$", type(module).__name__) is not None

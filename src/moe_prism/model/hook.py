"""The one function registered with transformers, and the record of which modules run through it.

A config is shared by all layers of a model, a function belongs to one module: the config keeps the hook as long as one of its
modules has a function, and gets its own implementation back with the last one. The record is kept here and not on the config,
which would write it into config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..checkpoint.constant import ANY_ID
from .base import ExpertsFn

HOOK = "moe_prism"
_FUNCTION = ANY_ID[0]


@dataclass
class _Hooked:
    config: Any  # held, so that its id is not given to another config
    previous: str | None
    modules: WeakSet[nn.Module] = field(default_factory=WeakSet)


_hooked: dict[int, _Hooked] = {}


def install(module: nn.Module, function: ExpertsFn) -> None:
    """Route `module` through `function`; the other modules of its config keep running as before."""
    for key in [key for key, entry in _hooked.items() if not entry.modules]:
        del _hooked[key]  # its model is gone
    config: Any = module.config
    entry = _hooked.get(id(config))
    if entry is None:
        entry = _hooked[id(config)] = _Hooked(config, getattr(config, "_experts_implementation", None))
    entry.modules.add(module)
    # not by setattr: a function that is itself an nn.Module would become a part of the model
    module.__dict__[_FUNCTION] = function
    if getattr(config, "_experts_implementation", None) != HOOK:
        config._experts_implementation = HOOK


def uninstall(module: nn.Module) -> None:
    """Undo `install`. Nothing happens where nothing is installed."""
    module.__dict__.pop(_FUNCTION, None)
    entry = _hooked.get(id(module.config))
    if entry is None:
        return
    entry.modules.discard(module)
    if not entry.modules:
        entry.config._experts_implementation = entry.previous
        del _hooked[id(module.config)]


def stock_forward(module: nn.Module) -> Any:
    """The eager forward the family's file defines, under the decorator that adds the dispatch."""
    return type(module).forward.__wrapped__  # type: ignore[attr-defined]


def dispatch(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The module's installed function, else what its config asked for before the hook."""
    function: ExpertsFn | None = module.__dict__.get(_FUNCTION)
    if function is not None:
        return function(hidden_states, top_k_index, top_k_weights)
    return native(module, hidden_states, top_k_index, top_k_weights)


def native(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation the module's config asks for beside the hook (grouped_mm by default), which is the fastest exact one."""
    entry = _hooked.get(id(module.config))
    previous = entry.previous if entry is not None else getattr(module.config, "_experts_implementation", None)
    name = previous if previous not in (None, HOOK) else "eager"
    forward = ALL_EXPERTS_FUNCTIONS.get_interface(name, stock_forward(module))
    return forward(module, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


ALL_EXPERTS_FUNCTIONS.register(HOOK, dispatch)

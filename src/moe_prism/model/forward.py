"""A seam for modules without transformers' experts interface: the module's own `forward` is replaced, on this one instance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from ..checkpoint.constant import ANY_ID
from .base import ExpertsFn, MoELayer

_BEFORE = ANY_ID[1]


def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Run `forward` instead of the module's own until `restore`."""
    module.__dict__.setdefault(_BEFORE, module.__dict__.get("forward"))  # of another library, which has the same idea
    module.__dict__["forward"] = forward


def restore(module: nn.Module) -> None:
    """Undo `replace`, however often it was called. Nothing happens where nothing is replaced."""
    if _BEFORE not in module.__dict__:
        return
    before = module.__dict__.pop(_BEFORE)
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


class ForwardLayer(MoELayer):
    """A layer whose functions are installed by `replace`."""

    @abstractmethod
    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        """The module's forward, as its family calls it, with `function` as the computation of its experts."""

    def install(self, function: ExpertsFn) -> None:
        replace(self.module, self.adapted(function))

    def uninstall(self) -> None:
        restore(self.module)

"""What a norm is, told by its tensors."""

from __future__ import annotations

from torch import nn


def is_norm(module: nn.Module, hidden: int) -> bool:
    """Whether a module without children holds one or two vectors [hidden] and nothing else."""
    own = list(module.parameters(recurse=False))
    return not list(module.children()) and len(own) in (1, 2) and all(tuple(p.shape) == (hidden,) for p in own)

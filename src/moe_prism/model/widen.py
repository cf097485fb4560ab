"""A model of a CPU whose experts stay as they are stored, bfloat16, while everything else is float32.

The experts are nearly all of a model. The compiled products read bfloat16 rows and widen them in registers, which is exact: the outputs
are those of a model that is float32 altogether, from half of the memory and half of the bytes per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import INPUT_DTYPE, MoELayer
from .fused import FusedLayer

ROW = 16  # numbers: rows that every processor's vectors divide


def stays_narrow(layer: MoELayer) -> bool:
    """Whether the compiled products take a layer's weights as they are stored."""
    plain = type(layer) is FusedLayer and layer.extra is None and layer.gate is not None and layer.is_silu
    plain = plain and layer.up_bias is None and layer.down_bias is None
    return plain and layer.up.dtype == torch.bfloat16 and layer.hidden % ROW == 0


@torch.no_grad()
def widen(model: Any, layers: Sequence[MoELayer]) -> None:
    """Make a model on the CPU float32, in place, except for experts that may stay as they are stored."""
    narrow = {id(layer.module) for layer in layers if stays_narrow(layer)}
    for module in model.modules():
        if id(module) in narrow:
            setattr(module, INPUT_DTYPE, torch.float32)
            continue
        for tensor in (*_own(module._parameters.values()), *_own(module._buffers.values())):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = torch.float32


def _own(tensors: Iterable[Tensor | None]) -> Iterable[Tensor]:
    return (t for t in tensors if t is not None)

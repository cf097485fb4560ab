"""The outputs of few rows, by one call for each product: at decode, preparing a job (`batch_products.py`) costs more than the job.

Shapes: S rows of a result, each with its row of x and its expert (or slot of an arena).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.row_products import adds, dots
from ..base import LayerParts
from .batch_products import MatrixPart, activated, usable

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

ENOUGH = 4096  # rows of a result at most
ORDER: Ints = np.arange(ENOUGH)
FIRST: Ints = np.zeros(ENOUGH, np.int64)


def table_of(parts: Sequence[MatrixPart]) -> Ints:
    """[P, 5]: where the first row of each part lies, strides of experts and rows, first column and column step."""
    cells = []
    for p in parts:
        m = p.matrix
        cells.append([m.address + m.tensor.element_size() * p.start * m.row, m.expert, p.jump * m.row, p.column, p.step])
    return np.array(cells, np.int64)


def rows_of(tokens: int, k: int) -> Ints:
    """The token of every choice [T k]."""
    return FIRST[:k] if tokens == 1 else ORDER[: tokens * k] // k


def like_of(dtype: torch.dtype) -> Any:
    """A number of the type that stands for weights of a dtype in `tiles`."""
    return np.float32(0) if dtype == torch.float32 else np.uint16(0)


def few_outputs(parts: LayerParts, x: Tensor, row: Ints, weight: Floats, expert: Ints) -> Floats | None:
    """[S, d]: weight x output of whole experts (a parts of one block each), for the rows row [S] of x [T, d].

    As `tiled` gives them, to the last bit; None where it could not either, or where there are too many rows.
    """
    layer = parts.layer
    stored = usable(parts, x) if len(row) <= ENOUGH and layer.up_bias is None and layer.down_bias is None else None
    if stored is None:
        return None
    if parts.few is None or parts.few[0] is not stored:
        parts.few = stored, table_of(stored.first), table_of([MatrixPart(stored.down, 0)]), like_of(stored.down.tensor.dtype)
    _, first, down, like = parts.few
    x = x if x.stride(1) == 1 else x.contiguous()
    pre = np.empty((len(row), len(stored.first) * parts.block), np.float32)
    dots(x.detach().numpy(), row, expert, layer.num_experts - 1, first, parts.block, ORDER, pre, like)
    a = activated(layer, torch.from_numpy(pre)).numpy()
    out = np.empty((len(row), x.shape[1]), np.float32)
    adds(a, weight, expert, down, ORDER, out, like)
    return out

"""The side tensors of an artefact: every name that stands in `prism.safetensors`, after `layers.<i>.`, in one table.

A side tensor belongs to one layer. The table says its shape, its kind of number and its range: compiled code reads them without looking, so
whatever comes from a file is held against it once, when a model is made elastic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CorruptError, UsageError

RIDGE = "ridge"
CUTOFFS = "cutoffs"
SHARES = "shares"
LAYER_BUDGETS = "layer_budgets"
REPAIR = "repair"
LOW_RANK_MAP, LOW_RANK_HEADS = "low_rank.map", "low_rank.heads"
COMPENSATE = "compensate."
"""What compensation reads: `compensate.<method>.<name>`."""
AGAIN = "restore the folder, or run `moe-prism refactor` again"
POSITIONS = 129
"""Of a rule's dial, evenly spaced from nothing to everything, where something is known of it."""
LARGEST = 1e9  # of a weight: beyond it products overflow
MOST_FREE = 4096  # of a dimension that the model does not fix


class SideTensor(NamedTuple):
    """shape: names of dimensions (E experts, N blocks, d hidden, f neurons, S slots of a token, and sums of them).

    What the model does not fix is the same in all tensors of a layer. weights: bfloat16 as a rule, else a float32 table of numbers from 0
    on. order: 1 rising, -1 falling. high: the largest number.
    """

    shape: tuple[str, ...]
    weights: bool = True
    order: int = 0
    high: float = LARGEST


TENSORS: Mapping[str, SideTensor] = {
    RIDGE: SideTensor(("E", "N", "d + N r + 1")),  # the default scorer
    CUTOFFS: SideTensor(("positions",), False, -1, 1e30),  # of the threshold rule
    SHARES: SideTensor(
        ("positions",), False, 1, 1.0
    ),  # of the layer's slots, those that reached each cutoff on the calibration text
    LAYER_BUDGETS: SideTensor(("S",), False, 1, 1.0),  # of the rule of that name
    REPAIR: SideTensor(("bands", "E", "d", "f")),  # D_b of every band, of `recover --method repair`
    LOW_RANK_MAP: SideTensor(("R", "d + 1")),  # of the low-rank scorer
    LOW_RANK_HEADS: SideTensor(("E", "N", "2 R + N r + 1")),
    f"{COMPENSATE}mean.vectors": SideTensor(("E", "N", "d")),
    f"{COMPENSATE}scale.factors": SideTensor(("E", "N + 1")),
    f"{COMPENSATE}low-rank.mean": SideTensor(("E", "N", "d")),
    f"{COMPENSATE}low-rank.read": SideTensor(("E", "N", "rank", "d")),
    f"{COMPENSATE}low-rank.write": SideTensor(("E", "N", "rank", "d")),
}
FORMER = {"levels": CUTOFFS, "plan": LAYER_BUDGETS}
"""Names that version 0.1 wrote."""


class LayerShape(NamedTuple):
    """What the model fixes of a layer's side tensors. k: experts per token, None where nothing says it."""

    experts: int
    hidden: int
    width: int
    n_sub: int
    gates: int
    k: int | None


def of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's side tensors by today's names."""
    return {FORMER.get(name, name): tensor for name, tensor in tensors.items()}


def expert_dimension(name: str) -> int | None:
    """The dimension of a side tensor that runs over experts; None where they share it. UsageError for a name that is not known."""
    if name not in TENSORS:
        raise UsageError(f"the side tensor '{name}' is not known", "use the moe-prism version that wrote it")
    shape = TENSORS[name].shape
    return shape.index("E") if "E" in shape else None


def check_values(where: str, tensors: Mapping[str, Tensor]) -> None:
    """CorruptError for side tensors of a layer with an unknown name, of another kind of number, or out of range."""
    for name, tensor in tensors.items():
        if name not in TENSORS:
            raise CorruptError(f"{where}: the side tensor '{name[:80]}' is not known", "use the moe-prism version that wrote it")
        problem = _problem(TENSORS[name], tensor)
        if problem:
            raise CorruptError(f"{where}: '{name}' {problem}", AGAIN)
    methods = {name.split(".")[1] for name in tensors if name.startswith(COMPENSATE)}
    if len(methods) > 1:
        raise CorruptError(f"{where}: it holds compensation by {' and '.join(sorted(methods))}, expected one method", AGAIN)


def check_shapes(where: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> None:
    """CorruptError for a side tensor that does not have the shape its layer asks for, or lies without those it belongs to."""
    block, free = shape.width // shape.n_sub, dict[str, int]()
    if shape.width % shape.n_sub or not 0 <= shape.gates <= block:
        raise CorruptError(
            f"{where}: {shape.n_sub} sub-experts of {shape.gates} gate neurons do not fit {shape.width} neurons", AGAIN
        )
    for name in _partners(tensors):
        if name not in tensors:
            raise CorruptError(f"{where}: '{name}' is missing", AGAIN)
    for name, tensor in tensors.items():
        known = TENSORS.get(name)
        if known is None:
            continue  # of somebody who registers a scorer of their own and attaches its tensors
        wanted = [_size(dimension, shape, free, size) for dimension, size in zip(known.shape, tensor.shape, strict=False)]
        if tensor.ndim != len(known.shape) or list(tensor.shape) != wanted:
            raise CorruptError(
                f"{where}: '{name}' is {list(tensor.shape)}, expected [{', '.join(known.shape)}] = {wanted}", AGAIN
            )


def _partners(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What has to be there because something else is."""
    for group in ((LOW_RANK_MAP, LOW_RANK_HEADS), tuple(f"{COMPENSATE}low-rank.{part}" for part in ("mean", "read", "write"))):
        if any(name in tensors for name in group):
            yield from group


def _size(dimension: str, shape: LayerShape, free: dict[str, int], found: int) -> int:
    """How long a dimension has to be; one that the model does not fix is as long as it was first found."""
    n, d, gates = shape.n_sub, shape.hidden, shape.n_sub * shape.gates
    fixed = {
        "E": shape.experts, "N": n, "d": d, "f": shape.width, "positions": POSITIONS, "N + 1": n + 1, "d + 1": d + 1,
        "d + N r + 1": d + gates + 1,
    }  # fmt: skip
    if dimension in fixed:
        return fixed[dimension]
    if dimension == "S":
        return shape.k * n if shape.k else min(max(found, 1), MOST_FREE * n)
    if dimension == "2 R + N r + 1":
        return 2 * free.setdefault("R", max((found - gates - 1) // 2, 1)) + gates + 1
    return free.setdefault(dimension, min(max(found, 1), max(n - 1, 1) if dimension == "bands" else MOST_FREE))


def _problem(known: SideTensor, tensor: Tensor) -> str | None:
    """What is wrong with the numbers of a tensor, None if nothing."""
    legal = (torch.bfloat16, torch.float16, torch.float32) if known.weights else (torch.float32,)
    if tensor.dtype not in legal:
        return f"is {_name(tensor.dtype)}, expected {' or '.join(map(_name, legal))}"
    if not tensor.numel():
        return "is empty"
    low, high = (float(x) for x in torch.aminmax(tensor.float()))  # NaN if there is one
    if not (-known.high if known.weights else 0.0) <= low <= high <= known.high:
        return f"holds {low:g} to {high:g}, expected {-known.high if known.weights else 0:g} to {known.high:g}"
    if known.order and bool(((tensor.flatten().diff() * known.order) < 0).any()):
        return f"must be {'rising' if known.order > 0 else 'falling'}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Values of a checkpoint's tensors: read from a file, and looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CorruptError
from .header import TensorInfo, corrupt

CHUNK = 1 << 22  # elements looked at together: bounds the scan's scratch memory


def read_rows(path: Path, info: TensorInfo, first: int, last: int) -> Tensor:
    """Rows first to last of its leading dimension."""
    row = info.bytes // info.shape[0]
    begin = info.begin + first * row
    part = replace(info, shape=(last - first, *info.shape[1:]), begin=begin, end=begin + (last - first) * row)
    return read_tensor(path, part)


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """The tensor `info` describes in the file `path`, in fresh memory."""
    dtype = info.torch_dtype
    if not info.bytes:
        return torch.empty(info.shape, dtype=dtype)
    buffer = bytearray(info.bytes)
    with path.open("rb") as file:
        file.seek(info.begin)
        if file.readinto(buffer) != info.bytes:
            raise corrupt(path, f"byte {info.begin}: tensor '{info.name}' is cut short")
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(info.shape)


def first_non_finite(tensor: Tensor) -> int | None:
    """Flat position of the first NaN or infinity, None if all values are finite. Scratch memory is bounded by CHUNK elements."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        finite = torch.isfinite(part.float() if part.element_size() == 1 else part)
        if not bool(finite.all()):
            return start + int((~finite).int().argmax())
    return None


def check_finite(name: str, tensor: Tensor, where: str, first: int = 0) -> None:
    """CorruptError naming the tensor, its place and `where` if it holds a NaN or infinity. first: where its rows begin in all of it."""
    position = first_non_finite(tensor)
    if position is not None:
        place = [int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape)] if tensor.ndim else []
        place[:1] = [at + first for at in place[:1]]
        value = float(tensor.reshape(-1)[position].real)
        raise CorruptError(f"{where}: tensor '{name}' holds {value} at {place}", "restore the weights from their source")

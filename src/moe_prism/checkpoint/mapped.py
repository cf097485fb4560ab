"""Experts of a layer that is larger than memory: they lie in a file, and the system brings in the pages that somebody uses.

The tensors are as any others, to read and to write, so nobody who computes with them knows. A few experts at a time are read into them, and
put into the form of the files again. The file has no name: it goes with the tensor, also where the process is killed.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .convert import ADVICE, Conversion, Read, place

TOGETHER = 8  # experts that are read, or written, at a time
Groups = Mapping[str, list[list[str]]]
"""{parameter: for every expert the tensors on disk that it is put together from}."""
NUMBER = re.compile(r"\d+")


def by_expert(names: Sequence[str], experts: int) -> list[list[str]] | None:
    """Names of tensors on disk by the number of the expert that is in them, the same kinds in the same order; None where none is."""
    numbers = [NUMBER.findall(name) for name in names]
    for place_ in range(min(map(len, numbers), default=0)):
        found: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for name, own in zip(names, numbers, strict=True):
            found[int(own[place_])].append((_without(name, place_), name))
        kinds = {tuple(sorted(kind for kind, _ in own)) for own in found.values()}
        if set(found) == set(range(experts)) and len(kinds) == 1:
            return [[name for _, name in sorted(found[e])] for e in range(experts)]
    return None


def _without(name: str, place_: int) -> str:
    """The name without its number at this place."""
    span = list(NUMBER.finditer(name))[place_].span()
    return name[: span[0]] + name[span[1] :]


def mapped_tensor(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of an unnamed file there. OSError where the disk has no room for it."""
    count = torch.Size(shape).numel()
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        mapping = mmap.mmap(file.fileno(), count * dtype.itemsize)
    return torch.frombuffer(mapping, dtype=dtype, count=count).view(torch.Size(shape))


def load_mapped(
    conversion: Conversion, groups: Groups, empty: Mapping[str, Tensor], folder: Path, read: Read | None = None
) -> None:
    """Fill these parameters, a few experts at a time. empty: of each its shape and type."""
    whole = {target: mapped_tensor(folder, tuple(empty[target].shape), empty[target].dtype) for target in groups}
    experts = len(next(iter(groups.values())))
    for first in range(0, experts, TOGETHER):
        here = {target: own[first : first + TOGETHER] for target, own in groups.items()}
        for target, own in here.items():
            few = torch.empty((len(own), *empty[target].shape[1:]), dtype=empty[target].dtype, device="meta")
            place(conversion.model, target, nn.Parameter(few, requires_grad=False))
        conversion.load([name for own in here.values() for expert in own for name in expert], read)
        for target, own in here.items():
            whole[target][first : first + len(own)] = conversion.model.get_parameter(target).detach()
    for target, tensor in whole.items():
        place(conversion.model, target, nn.Parameter(tensor, requires_grad=False))


def disk_parts(conversion: Conversion, groups: Groups, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """These parameters as the files store them, a few experts at a time. UsageError names a tensor that would come back otherwise."""
    experts = len(next(iter(groups.values())))
    for first in range(0, experts, TOGETHER):
        few = {target: state[target][first : first + TOGETHER] for target in groups}
        # what lies first is written under the names of the first experts
        names = {
            first_name: own_name
            for own in groups.values()
            for first_names, own_names in zip(own, own[first : first + TOGETHER], strict=False)
            for first_name, own_name in zip(first_names, own_names, strict=True)
        }
        found = conversion.disk_form(few, set(names))
        different = sorted(set(names) ^ set(found))
        if different:
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        part = {names[name]: tensor for name, tensor in found.items()}
        conversion.check_form(part)
        yield part

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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .convert import ADVICE, Conversion, Read, place
from .shards import Source

TOGETHER = 8  # experts that are read, or written, at a time
NUMBER = re.compile(r"\d+")


class ExpertTensors(NamedTuple):
    """What a parameter of experts is put together from on disk: tensors of one expert each, or one that holds them all."""

    single: list[list[str]]
    stacked: str = ""

    def names(self, first: int, last: int) -> list[str]:
        """Of the experts from first to last."""
        return [self.stacked] if self.stacked else [name for own in self.single[first:last] for name in own]

    @classmethod
    def of(cls, names: Sequence[str], experts: int, source: Source) -> ExpertTensors | None:
        """None where a few experts cannot be read by themselves."""
        single = by_expert(names, experts)
        if single is not None:
            return cls(single)
        [name, *others] = names or [""]
        if not name or others or not source.has_rows(name) or source.info(name).shape[0] != experts:
            return None
        return cls([], name)


Groups = Mapping[str, ExpertTensors]
"""By parameter."""


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


class DiskPart(NamedTuple):
    """Tensors by their names on disk. first: of each only the rows from there on are here; None: all of them."""

    tensors: dict[str, Tensor]
    first: int | None = None

    def bytes_before(self, name: str) -> int:
        """Where in the tensor of a file this part begins."""
        tensor = self.tensors[name]
        return (self.first or 0) * (tensor.nbytes // max(1, len(tensor))) if tensor.ndim else 0

    def stored(self, source: Source, name: str) -> Tensor:
        """The same part of the file's tensor."""
        if self.first is None:
            return source.stored(source.info(name))
        return source.stored_rows(name, self.first, self.first + len(self.tensors[name]))


def load_mapped(
    conversion: Conversion, groups: Groups, empty: Mapping[str, Tensor], folder: Path, read: Read | None = None
) -> None:
    """Fill these parameters, a few experts at a time. empty: of each its shape and type."""
    whole = {target: mapped_tensor(folder, tuple(empty[target].shape), empty[target].dtype) for target in groups}
    experts = len(next(iter(whole.values())))
    for first in range(0, experts, TOGETHER):
        last = min(first + TOGETHER, experts)
        for target, few in _some(conversion, groups, empty, range(first, last), read).items():
            whole[target][first:last] = few
    for target, tensor in whole.items():
        place(conversion.model, target, nn.Parameter(tensor, requires_grad=False))


def load_first(conversion: Conversion, groups: Groups, empty: Mapping[str, Tensor]) -> None:
    """Read a few experts, and let each of a layer be the first of them: what takes as long as the layer, and no memory."""
    experts = min(TOGETHER, len(next(iter(empty.values()))))
    for target, few in _some(conversion, groups, empty, range(experts), None).items():
        place(conversion.model, target, nn.Parameter(few[:1].clone().expand(empty[target].shape), requires_grad=False))


def _some(
    conversion: Conversion, groups: Groups, empty: Mapping[str, Tensor], experts: range, read: Read | None
) -> dict[str, Tensor]:
    """These experts of the parameters. read: what gives a tensor on disk by its name, where that is not the source."""
    first, last = experts.start, experts.stop
    stacked = {own.stacked for own in groups.values() if own.stacked}

    def part(name: str) -> Tensor:
        if name not in stacked:
            return (read or conversion.source.tensor)(name)
        return conversion.source.rows(name, first, last) if read is None else read(name)[first:last]

    for target in groups:
        few = torch.empty((len(experts), *empty[target].shape[1:]), dtype=empty[target].dtype, device="meta")
        place(conversion.model, target, nn.Parameter(few, requires_grad=False))
    conversion.load([name for own in groups.values() for name in own.names(first, last)], part)
    return {target: conversion.model.get_parameter(target).detach() for target in groups}


def disk_parts(conversion: Conversion, groups: Groups, state: Mapping[str, Tensor]) -> Iterator[DiskPart]:
    """These parameters as the files store them, a few experts at a time. UsageError names a tensor that would come back otherwise."""
    experts = len(next(iter(state[target] for target in groups)))
    for first in range(0, experts, TOGETHER):
        last = min(first + TOGETHER, experts)
        few = {target: state[target][first:last] for target in groups}
        # what lies first is written under the names of the first experts
        names = {
            first_name: own_name
            for own in groups.values()
            for first_name, own_name in zip(own.names(0, last - first), own.names(first, last), strict=True)
        }
        found = conversion.disk_form(few, set(names))
        different = sorted(set(names) ^ set(found))
        if different:
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        stacked = {own.stacked for own in groups.values() if own.stacked}
        single = {names[name]: tensor for name, tensor in found.items() if name not in stacked}
        rows = {name: tensor for name, tensor in found.items() if name in stacked}
        conversion.check_form(single)
        conversion.check_form(rows, last - first)
        if single:
            yield DiskPart(single)
        if rows:
            yield DiskPart(rows, first)

"""The files of unfinished refactoring, one per layer and per run of the profile: what a journal lists, and what several processes join."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefact.load import read_tensors
from ..checkpoint import Journal, OutputFolder, check_finite, read_header
from ..checkpoint.atomic import JOURNAL, sha256_file
from ..checkpoint.formats.requantize import TOGETHER, Counts
from ..elastic.side_tensors import check_values
from ..errors import CorruptError, UsageError
from ..model import MoELayer
from ..result import Result
from ..schema import check, decode, read_form
from ..schema.journal import JournalForm
from ..schema.manifest import LayerForm
from .solve_layer import IMPORTANCE, PERM, PRODUCTS, WORKING

AGAIN = "use --force to start again"


@dataclass(frozen=True)
class Shard:
    """One part of the work: layers number, number + count, ... of the model, or a run of its text. number: from 0."""

    number: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """The shard of "2/4", counted from 1. UsageError for anything else."""
        number, slash, count = text.partition("/")
        if not slash or not (number.isdecimal() and count.isdecimal()) or not 1 <= int(number) <= int(count) <= 4096:
            raise UsageError(f"--shard {text} is no part of the work", "write I/N, such as 1/4 for the first of four parts")
        return cls(int(number) - 1, int(count))

    def __iter__(self) -> Iterator[int]:
        yield from (self.number, self.count)

    def of_layers(self, layers: Sequence[MoELayer]) -> list[MoELayer]:
        """Its layers. Every n-th, so that parts are alike where early layers differ from late ones."""
        return list(layers[self.number :: self.count])


@dataclass(frozen=True)
class Solved(Result):
    """A shard: folder is what `refactor --join` takes; layers: numbers of the MoE layers that were solved."""

    folder: Path
    layers: list[int]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "layers": self.layers}


def join(shards: Sequence[str | Path], folder: OutputFolder, journal: Journal) -> None:
    """Take the finished layers of shards, each the OUT that one was given, as if they had been solved here.

    UsageError where a shard was made of something else, CorruptError where a file is not what its journal says.
    """
    for shard in shards:
        given = Path(shard).expanduser()
        work = given if (given / JOURNAL).is_file() else given.with_name(given.name + ".partial")
        if not (work / JOURNAL).is_file():
            raise UsageError(f"there is no shard '{shard}'", "give the --out of a `moe-prism refactor --shard`")
        form = read_form(JournalForm, work / JOURNAL, "solve this shard again")
        journal.check(form.fingerprint, f"the shard '{shard}'", "solve all shards with the same options")
        for unit, sha256 in form.units.items():
            if journal.done(unit) or not unit.startswith("unit-"):
                continue
            _take(work / unit, folder.work / unit, sha256)
            journal.finish(unit, sha256)


def _take(source: Path, target: Path, sha256: str) -> None:
    """A file of a shard, under the same name here."""
    if source.is_symlink() or not source.is_file() or sha256_file(source) != sha256:
        raise CorruptError(f"{source} is not what its journal says", "solve this shard again")
    temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
    temporary.write_bytes(source.read_bytes())
    temporary.replace(target)


def profile_run(path: Path) -> dict[str, Tensor]:
    """{kl [L], slots} of one run of the profile. CorruptError for anything else."""
    found = read_tensors(path)
    if {name: t.ndim for name, t in found.items()} != {"kl": 1, "slots": 0} or found["slots"].dtype != torch.int64:
        raise CorruptError(f"{path} is no profile of layers", AGAIN)
    check_finite("kl", found["kl"], path.name)
    return found


def profile_name(point: int) -> str:
    """The file of a run of the profile."""
    return f"profile-{point:02d}.safetensors"


def unit_name(layer: MoELayer) -> str:
    """The file of a solved layer."""
    return f"unit-{layer.index:03d}.safetensors"


def read_unit(folder: OutputFolder, layer: MoELayer) -> dict[str, Tensor]:
    """The tensors of a solved layer. CorruptError where they are not of its shape."""
    path = folder.work / unit_name(layer)
    tensors, shape = read_tensors(path), (layer.num_experts, layer.width)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {PERM: (torch.int32, shape), IMPORTANCE: (torch.float32, shape)}
    if PRODUCTS in tensors:
        wanted[PRODUCTS] = (torch.float32, (layer.num_experts, -(-layer.width // TOGETHER), TOGETHER, TOGETHER))
        check_finite(PRODUCTS, tensors[PRODUCTS], path.name)
    for name, form in wanted.items():
        if name not in tensors or (tensors[name].dtype, tuple(tensors[name].shape)) != form:
            raise CorruptError(f"{path}: '{name}' must be {list(form[1])} for '{layer.name}'", AGAIN)
    check_values(str(path), {name: tensor for name, tensor in tensors.items() if name not in WORKING})
    return tensors


def counts(unit: Mapping[str, Tensor]) -> Counts:
    """What an error in a solved layer's output weights counts."""
    return Counts(unit[IMPORTANCE], unit.get(PRODUCTS))


def unit_facts(folder: OutputFolder, layer: MoELayer) -> dict[str, Any]:
    """What prism.json says of a solved layer."""
    path = folder.work / unit_name(layer)
    text = read_header(path).metadata.get("facts", "")
    facts = check(LayerForm, decode(text.encode(), str(path), AGAIN), str(path), AGAIN)
    return facts.model_dump(exclude_unset=True)

"""A model of which one decoder layer is there: a batch of a job is run on it, and timed, before the job begins.

The other decoder layers hand on what they are given. What a batch spends inside the one layer then counts once per layer, the rest once.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.statistics import LayerStatistics
from ..checkpoint import LayerStream
from ..checkpoint.mapped import TOGETHER
from ..cores import processor
from ..elastic.other_weights import OtherWeights
from ..elastic.runtime import experts_per_token
from ..elastic.side_tensors import expert_dimension
from ..errors import DoesNotFit
from ..forecast.work_time import Seconds, Split, timed
from ..memory import available_memory
from ..model import MoELayer, find_layers

READ = 64 << 20  # bytes that are read to see how fast that goes
WRITTEN = 16 << 20  # bytes that are written to see how fast that goes


class Pilot:
    """Inside `there()` the model runs. layer: its first MoE layer; layers: how many decoder layers the whole model has.

    on_disk: its experts do not fit. A few are read, and one of them stands for all; what the disk takes comes on top (`disk_time.py`).
    """

    def __init__(self, where: Path, on_disk: bool = False) -> None:
        self.stream = LayerStream(where, torch.float32)
        self.stream.is_trial = self.on_disk = on_disk
        self.model = self.stream.model
        self.layer: MoELayer = find_layers(self.model)[0]
        names = self.stream.layer_names()
        self.layers = len(names)
        self._name = next(name for name in names if self.layer.name.startswith(f"{name}."))
        self._inside, self._begin = Seconds(), Seconds()

    @property
    def bytes(self) -> int:
        """Of all parameters in float32."""
        count: int = sum(p.numel() for p in self.model.parameters())
        return count * torch.float32.itemsize

    @contextmanager
    def there(self) -> Iterator[None]:
        """Everything but the other decoder layers is in memory. No gradients. DoesNotFit where there is less than that."""
        if (least := self._least()) > (free := available_memory()):
            raise DoesNotFit(f"a layer needs {least >> 20} MiB, {free >> 20} are free", "use a larger machine")
        own, others = self.model.get_submodule(self._name), [n for n in self.stream.layer_names() if n != self._name]
        handles = [own.register_forward_pre_hook(self._enter), own.register_forward_hook(self._leave)]
        handles += [own.register_full_backward_pre_hook(self._enter), own.register_full_backward_hook(self._leave)]
        try:
            with torch.no_grad(), self.stream.resident(), self.stream.module(self._name):
                for name in others:
                    self.model.get_submodule(name).forward = _handed_on
                yield
        finally:
            for name in others:
                self.model.get_submodule(name).__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    def _least(self) -> int:
        """Bytes of the layer and of what lies outside of all layers, and of the layer's experts as they are read."""
        sizes: dict[str, int] = {
            name: sum(p.numel() for p in self.model.get_submodule(name).parameters()) for name in self.stream.layer_names()
        }
        outside = self.bytes - sum(sizes.values()) * torch.float32.itemsize
        experts: int = self.layer.num_experts * self.layer.parameters_per_expert()
        read = self._read_experts() * self.layer.parameters_per_expert()
        return outside + (sizes[self._name] - experts + 2 * read) * torch.float32.itemsize

    def _read_experts(self) -> int:
        """How many experts of the layer are read when it is."""
        return min(TOGETHER, self.layer.num_experts) if self.on_disk else self.layer.num_experts

    def split(self, work: Callable[[], object]) -> Split:
        """What it spends inside the layer and outside of it."""
        self._inside = Seconds()
        total = timed(work)
        return Split(self._inside, total - self._inside)

    def load(self) -> Seconds:
        """Of reading the whole model, by reading the layer once."""
        here: int = sum(p.numel() for p in self.model.get_submodule(self._name).parameters())
        here -= (self.layer.num_experts - self._read_experts()) * self.layer.parameters_per_expert()

        def read() -> None:
            with self.stream.module(self._name):
                pass

        return timed(read) * (self.bytes / torch.float32.itemsize / here)

    def name(self, job: str, *more: object) -> str:
        """What a time of this model on this machine is known by."""
        layer, config = self.layer, self.model.config.get_text_config()
        k = experts_per_token(self.model, layer)
        shape = (
            f"{config.model_type} L{self.layers} E{layer.num_experts} k{k} d{layer.hidden} f{layer.width} V{config.vocab_size}"
        )
        where = f"{processor()} torch{torch.__version__} threads{torch.get_num_threads()}"
        return " ".join([where, shape, *(["on disk"] if self.on_disk else []), job, *map(str, more)])[:900]

    def _enter(self, *_: Any) -> None:
        self._begin = Seconds.now()

    def _leave(self, *_: Any) -> None:
        self._inside = self._inside + (Seconds.now() - self._begin)


def _handed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


class _Few(OtherWeights):
    """The first experts of a layer. They are views: what is done to them is done to the layer's own."""

    def __init__(self, layer: MoELayer, count: int) -> None:
        super().__init__(layer, None if layer.gate is None else layer.gate[:count], layer.up[:count], layer.down[:count])
        self.num_experts = count


def few_experts(layer: MoELayer, found: LayerStatistics, rows: Sequence[int]) -> tuple[MoELayer, LayerStatistics]:
    """The first experts of a layer, with a sample of so many rows each: those of the expert that has the most, again and again."""
    tokens, count = found.values["tokens"], len(rows)
    richest = int(tokens["kept"].argmax())
    take = torch.arange(max(rows)) % max(1, int(tokens["kept"][richest]))
    sample = {
        name: tokens[name][richest, take].expand(count, *tokens[name][richest, take].shape).clone()
        for name in ("x", "weight", "key")
    }
    sample["kept"] = torch.tensor(rows, dtype=torch.int64)
    counts = {name: (t[:count] if t.ndim and len(t) == layer.num_experts else t) for name, t in found.values["counts"].items()}
    return _Few(layer, count), LayerStatistics(found.name, {"counts": counts, "tokens": sample})


def typical(sizes: Sequence[float], count: int, least: int, most: int) -> list[int]:
    """So many sizes that stand for all of them, each for as many: from the middle of every part of them in their order.

    Experts are chosen unevenly, and work grows faster than rows, so an average expert would say too little.
    """
    order = sorted(sizes)
    middles = [order[int((i + 0.5) * len(order) / count)] for i in range(count)]
    return [round(min(most, max(least, size))) for size in middles]


def for_all(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Side tensors of a few experts as those of a whole layer, over and over."""
    found = {}
    for name, tensor in tensors.items():
        dim = expert_dimension(name)
        found[name] = tensor if dim is None else tensor.index_select(dim, torch.arange(experts) % tensor.shape[dim])
    return found


def written(bytes_: float, *, hashed: bool = True) -> Seconds:
    """Of so many bytes that are written and on the disk, hashed before or not, by doing that with a few."""
    data = bytes(WRITTEN)
    with tempfile.TemporaryFile() as file:

        def write() -> None:
            if hashed:
                hashlib.sha256(data)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        return timed(write) * (bytes_ / WRITTEN)


def read_back(shard: Path, bytes_: float) -> Seconds:
    """Of so many bytes that come from a disk, by reading the beginning of a file that the system is told to forget."""
    with shard.open("rb", buffering=0) as file:
        size = min(READ, os.fstat(file.fileno()).st_size)
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        return timed(lambda: file.read(size)) * (bytes_ / max(1, size))


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced, both ends among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]

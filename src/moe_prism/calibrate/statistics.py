"""The result of a calibration: per layer and collector, named tensors; on disk one safetensors file per layer beside a JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from ..checkpoint import check_finite
from ..errors import CorruptError, UsageError
from ..model import MoELayer
from ..result import Result
from . import collectors

AGAIN = "calibrate again"
STARVED = 256  # tokens; fewer say too little about an expert's neurons (spec section 3)
SMALL = 1 << 16  # bytes of a tensor that an outline keeps
COUNTED = ("count", "kept", "tokens", "residual_tokens")


@dataclass
class LayerStatistics:
    """Statistics of one MoE layer, keyed collector -> name -> tensor; domains: of each domain of the text, what has it (`has_domains`)."""

    name: str
    values: dict[str, dict[str, Tensor]]
    domains: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def inputs(self, expert: int) -> tuple[Tensor, Tensor]:
        """Sampled inputs x [S, d] (float32) and routing weights [S] of one expert."""
        x, weight = self.stored_inputs(expert)
        return x.float(), weight

    def stored_inputs(self, expert: int) -> tuple[Tensor, Tensor]:
        """The same in the type that they are kept in, without a copy."""
        tokens = self.values["tokens"]
        kept = int(tokens["kept"][expert])
        return tokens["x"][expert, :kept], tokens["weight"][expert, :kept]

    def kept(self) -> list[int]:
        """Sampled tokens per expert; none where no sample was kept."""
        return [int(n) for n in self.values["tokens"]["kept"]] if "tokens" in self.values else []

    def flat(self) -> dict[str, Tensor]:
        """By one name each: collector.name, or domain/collector.name."""
        every = {"": self.values, **{f"{domain}/": values for domain, values in self.domains.items()}}
        return {
            f"{d}{c}.{k}": v.contiguous() for d, values in every.items() for c, state in values.items() for k, v in state.items()
        }

    def outline(self) -> LayerStatistics:
        """The same with all that is small, and of larger tensors no more than their shape and type."""
        kept = {key: v.clone() if v.nbytes <= SMALL else v.to("meta") for key, v in self.flat().items()}
        return LayerStatistics.unflat(self.name, kept)

    @staticmethod
    def unflat(name: str, tensors: dict[str, Tensor]) -> LayerStatistics:
        """From flat names, as a file holds them, back to collectors and their statistics."""
        found = LayerStatistics(name, {})
        for key, tensor in tensors.items():
            domain, _, rest = key.rpartition("/")
            collector, _, inner = rest.partition(".")
            values = found.domains.setdefault(domain, {}) if domain else found.values
            values.setdefault(collector, {})[inner] = tensor
        return found

    def check(self, where: str, capacity: int, sizes: dict[str, int]) -> None:
        """CorruptError for statistics that no collector keeps, of another shape or kind of number, or out of range.

        sizes: what is known of E and d; what is found first holds for the layers that follow.
        """
        own = {"C": capacity, **sizes}
        for values in (self.values, *self.domains.values()):
            _check_kept(values, where, own)
        if own.get("S", 0) > capacity or any(n > capacity for n in self.kept()):
            raise CorruptError(f"{where}: it keeps more tokens than its {capacity} places", AGAIN)
        sizes.update({name: own[name] for name in ("E", "d") if name in own})


def _check_kept(values: dict[str, dict[str, Tensor]], where: str, own: dict[str, int]) -> None:
    """`LayerStatistics.check` of all text or of one domain; adds to the sizes that are known."""
    for collector, state in values.items():
        if collector not in collectors.names():
            raise CorruptError(f"{where}: no collector '{collector[:80]}' is known", AGAIN)
        keeps = collectors.get(collector).keeps
        for name in (*keeps, *state):
            if name not in state or name not in keeps:
                what = "is missing" if name in keeps else "is not known"
                raise CorruptError(f"{where}: '{collector}.{name[:80]}' {what}", AGAIN)
        for name, (shape, dtype) in keeps.items():
            tensor, place = state[name], f"{where}: '{collector}.{name}'"
            ends = [x if isinstance(x, int) else own.setdefault(x, n) for x, n in zip(shape, tensor.shape, strict=False)]
            if tensor.ndim != len(shape) or list(tensor.shape) != ends or tensor.dtype != dtype:
                found = f"{_name(tensor.dtype)}{list(tensor.shape)}"
                raise CorruptError(f"{place} is {found}, expected {_name(dtype)}{ends}", AGAIN)
            check_finite(f"{collector}.{name}", tensor, where)
            if name in COUNTED and tensor.numel() and int(tensor.min()) < 0:
                raise CorruptError(f"{place} holds a number below 0", AGAIN)


class StoredLayers(Sequence[LayerStatistics]):
    """Layers of a folder, each read when it is asked for and held by nobody after. read: layer i; outlines: of every layer."""

    def __init__(self, read: Callable[[int], LayerStatistics], count: int) -> None:
        self._read = read
        self.outlines = [read(i).outline() for i in range(count)]

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, at: int) -> LayerStatistics: ...
    @overload
    def __getitem__(self, at: slice) -> list[LayerStatistics]: ...
    def __getitem__(self, at: int | slice) -> LayerStatistics | list[LayerStatistics]:
        places = range(len(self))[at]
        return self._read(places) if isinstance(places, int) else [self._read(i) for i in places]


@dataclass
class Statistics(Result):
    """All layers, some of the windows for later runs of the whole model, and the facts of the pass (text, tokens, hashes, settings)."""

    layers: Sequence[LayerStatistics]
    profile: Tensor  # token ids [n, length], evenly spaced over the calibration text
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def outlines(self) -> Sequence[LayerStatistics]:
        """The layers where shapes and small numbers are enough: nothing is read for them."""
        return self.layers.outlines if isinstance(self.layers, StoredLayers) else self.layers

    def to_json(self) -> dict[str, Any]:
        """The facts of the pass, and experts with too few tokens to say much about them."""
        starved = self.starved(min(STARVED, self.facts["capacity"]))
        return {
            "layers": len(self.layers),
            "tokens": self.facts["tokens"],
            "reservoir": self.facts["capacity"],
            "starved": [{"layer": layer, "expert": e, "tokens": n} for layer, e, n in starved],
            **{name: self.facts[name] for name in ("tasks", "domains") if self.facts.get(name)},
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A row per layer and expert: the tokens that its sample holds."""
        return [
            {"layer": i, "expert": e, "sampled": n} for i, layer in enumerate(self.outlines) for e, n in enumerate(layer.kept())
        ]

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        """UsageError where they are of a model with other layers."""
        if [layer.name for layer in self.outlines] != [layer.name for layer in layers]:
            raise UsageError("the calibration has other layers than the model", "calibrate this model")
        for mine, layer in zip(self.outlines, layers, strict=True):
            found = {
                end: size
                for collector, state in mine.values.items()
                for name, (shape, _) in collectors.get(collector).keeps.items()
                for end, size in zip(shape, state[name].shape, strict=True)
            }
            sizes = {"E": layer.num_experts, "d": layer.hidden, "f": layer.width}
            if any(found.get(end, size) != size for end, size in sizes.items()):
                raise UsageError(f"the calibration does not fit '{layer.name}'", "calibrate this model")

    def starved(self, minimum: int) -> list[tuple[int, int, int]]:
        """(layer, expert, sampled tokens) of every expert with fewer than `minimum` tokens."""
        return [(i, e, n) for i, layer in enumerate(self.outlines) for e, n in enumerate(layer.kept()) if n < minimum]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

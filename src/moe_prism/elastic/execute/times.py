"""How long a layer takes here, per number of tokens: by the model's own function, and by the tiles at full and at half budget.

What is faster depends on the processor, the shape and the number of tokens, so it is measured, on the layer's own weights, when a size
is first met: some milliseconds at decode, less than one layer's forward for a prompt. The figures are kept per machine. All processes
then decide alike, and a model gives the same bits in each of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...cores import processor
from ...errors import PrismError, UsageError
from ...files import replace_file
from ...kernels.target import TARGET
from ...schema import read_form
from ...schema.cost import TimesForm
from ..base import LayerParts
from .tiled import tiled

CHOICE = "MOE_PRISM_WHOLE"
CHOICES = ("measure", "stock", "tiles")
"""Who computes whole experts: the faster one, or always the same."""
LARGEST = 12  # sizes are powers of two up to this one
SAMPLE_BYTES = 128 << 20  # of the experts a measurement touches: more than a cache holds
SAMPLE_WORK = 1 << 31  # multiplications of one turn
TURNS, MOST_TURNS, ENOUGH = 3, 20, 0.004  # turns of each, and seconds of measuring from which on no more are made
CLEAR = 0.97  # of the other's time: below it, a difference is none of chance


class LayerTimes(NamedTuple):
    """Seconds that one thread computes a layer: stock, and the tiles at all slots and at half of them."""

    stock: float
    tiles: float
    half: float

    @property
    def tiles_win(self) -> bool:
        """Whether the tiles compute the full budget."""
        return self.tiles < CLEAR * self.stock

    @property
    def tiles_serve(self) -> bool:
        """Whether the tiles take no longer than the other, however many slots are kept."""
        return max(self.tiles, self.half) <= self.stock

    @property
    def whole(self) -> float:
        """Seconds of the full budget, whoever computes it."""
        return self.tiles if self.tiles_win else self.stock

    def kept(self, share: float) -> float:
        """Seconds of a share of the slots by the tiles, read off the line through both measurements."""
        return self.tiles + 2 * (1 - share) * (self.half - self.tiles)


def forced() -> str:
    """What `MOE_PRISM_WHOLE` asks for. UsageError for a word that it does not know."""
    found = os.environ.get(CHOICE, CHOICES[0])
    if found not in CHOICES:
        raise UsageError(f"{CHOICE} is '{found}'", f"set it to one of: {', '.join(CHOICES)}")
    return found


def times_of(parts: LayerParts, tokens: int, k: int) -> LayerTimes:
    """The times of a layer for about so many tokens with k experts each."""
    size = min((max(tokens, 1) ** 2).bit_length() // 2, LARGEST)  # the nearest power of two
    key = size, k
    found: LayerTimes | None = parts.times.get(key)
    if found is None:
        name = _name(parts, k, 1 << size)
        if name not in _known:
            _known.update(_kept())
        if name not in _known:
            layer = parts.layer
            weights = (3 if layer.gate is not None else 2) * layer.hidden * layer.width
            sample = Sample.of(layer.num_experts, k, 1 << size, weights, layer.up.element_size())
            _known[name] = _keep(name, measure(parts, sample))
        found = parts.times[key] = _known[name]
    return found


_known: dict[str, LayerTimes] = {}


class Sample(NamedTuple):
    """A part of a layer, and of its batch, in which an expert has as many rows as in the whole."""

    tokens: int
    experts: int
    k: int

    @classmethod
    def of(cls, experts: int, k: int, tokens: int, weights: int, size: int = 4) -> Sample:
        """weights: of an expert; size: bytes of one."""
        part = max(1.0, min(experts, tokens * k) * weights * size / SAMPLE_BYTES, tokens * k * weights / SAMPLE_WORK)
        fewer = min(part, k)  # a part of every token's experts first, then of the tokens
        own = max(1, round(k / fewer))
        return cls(max(1, round(tokens * fewer / part)), max(own, round(experts / max(part, fewer))), own)


@torch.no_grad()
def measure(parts: LayerParts, sample: Sample) -> LayerTimes:
    """Time the ways of a layer on random rows and even routing."""
    layer, k = parts.layer, sample.k
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sample.tokens, layer.hidden, generator=g).to(layer.input_dtype)
    index = torch.rand(sample.tokens, sample.experts, generator=g).topk(k, 1).indices
    weight = torch.full((sample.tokens, k), 1 / k, dtype=x.dtype)
    ranks = torch.rand(sample.tokens, k * parts.n_sub, generator=g).argsort(1).argsort(1)
    half = (ranks < max(1, k * parts.n_sub // 2)).view(sample.tokens, k, parts.n_sub)
    one, every = whole_parts(parts), torch.ones(sample.tokens, k, 1, dtype=torch.bool)
    runs: list[Callable[[], Tensor | None]] = [
        lambda: layer.native(x, index, weight),
        lambda: _widened(one, x, index, weight, every),
        lambda: _widened(parts, x, index, weight, half),
    ]
    return LayerTimes(*_fastest(runs))


def _widened(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor | None:
    out = tiled(parts, x.float(), index, weight.float(), keep)
    return None if out is None else out.to(x.dtype)


def _fastest(runs: list[Callable[[], Tensor | None]]) -> list[float]:
    """Least seconds of each, taken in turns after one that warms up: processor time of one thread, which others disturb least."""
    found: list[list[float]] = [[] for _ in runs]
    with _one_thread():
        for run in runs:
            run()
        while len(found[0]) < TURNS or (sum(map(sum, found)) < ENOUGH and len(found[0]) < MOST_TURNS):
            for run, times in zip(runs, found, strict=True):
                begin = time.thread_time()
                run()
                times.append(time.thread_time() - begin)
    return [min(times) for times in found]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def whole_parts(parts: LayerParts) -> LayerParts:
    """The layer with one block per expert: what the full budget is computed with, to the bit of all blocks kept."""
    if parts.n_sub == 1:
        return parts
    if parts.whole is None:
        parts.whole = LayerParts(parts.layer, 1, 0)
    return parts.whole  # type: ignore[no-any-return]


def _name(parts: LayerParts, k: int, tokens: int) -> str:
    """What a measurement holds for: processor, library, shape, size."""
    layer = parts.layer
    shape = (
        f"E{layer.num_experts} k{k} d{layer.hidden} f{layer.width} N{parts.n_sub} {str(layer.up.dtype).removeprefix('torch.')}"
    )
    rows = "" if layer.input_dtype == layer.up.dtype else f" {str(layer.input_dtype).removeprefix('torch.')} rows"
    kind = f"{type(layer).__name__}{'' if layer.gate is None else ' gated'}{'' if layer.up_bias is None else ' biased'}"
    return f"{processor()} {TARGET.name} torch{torch.__version__} one-call {kind} {shape}{rows} T{tokens}"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-prism" / "layer-times.json"


def _kept() -> dict[str, LayerTimes]:
    """What this machine knows; nothing where the file is missing or is not ours."""
    try:
        return {name: LayerTimes(*values) for name, values in read_form(TimesForm, _file()).root.items()}
    except (PrismError, TypeError):
        return {}


def _keep(name: str, found: LayerTimes) -> LayerTimes:
    """Write a measurement down, unless another process was first: then its figures hold. Where nothing can be written, ours hold here."""
    known = _kept()
    if name in known:
        return known[name]
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_file(), json.dumps({**known, name: found}, indent=0).encode())
    except OSError:
        pass
    return found

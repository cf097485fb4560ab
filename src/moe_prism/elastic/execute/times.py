"""How long a layer takes here, per number of tokens: by the model's own function, and by the tiles at full and at half budget.

What is faster depends on the processor, the shape and the number of tokens, so it is measured, on the layer's own weights, when a size
is first met: some milliseconds at decode, less than one layer's forward for a prompt. The figures are kept per machine. All processes
then decide alike, and a model gives the same bits in each of them.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UsageError
from ...files import replace_file
from ...kernels.target import TARGET
from ..base import LayerParts
from .tiled import tiled

CHOICE = "MOE_PRISM_WHOLE"
CHOICES = ("measure", "stock", "tiles")
"""Who computes whole experts: the faster one, or always the same."""
LARGEST = 12  # sizes are powers of two up to this one
SAMPLE_BYTES = 128 << 20  # of the experts a measurement touches: more than a cache holds
SAMPLE_WORK = 1 << 31  # multiplications of one turn
TURNS, ENOUGH = 3, 0.004  # turns of each at least, and seconds of measuring from which on no more are made
CLEAR = 0.97  # of the other's time: below it, a difference is none of chance


class Times(NamedTuple):
    """Seconds of a layer: stock, and the tiles at all slots and at half of them."""

    stock: float
    tiles: float
    half: float

    @property
    def tiles_win(self) -> bool:
        """Whether the tiles compute the full budget."""
        return self.tiles < CLEAR * self.stock

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


def times_of(parts: LayerParts, tokens: int, k: int) -> Times:
    """The times of a layer for about so many tokens with k experts each."""
    size = min((max(tokens, 1) ** 2).bit_length() // 2, LARGEST)  # the nearest power of two
    key = size, k, torch.get_num_threads()
    found: Times | None = parts.times.get(key)
    if found is None:
        name = _name(parts, k, 1 << size)
        if name not in _known:
            _known.update(_kept())
        if name not in _known:
            _known[name] = _keep(name, measure(parts, 1 << size, k))
        found = parts.times[key] = _known[name]
    return found


_known: dict[str, Times] = {}


@torch.no_grad()
def measure(parts: LayerParts, tokens: int, k: int) -> Times:
    """Time them on random rows and even routing. Of a large layer some experts stand for all, with as many rows each."""
    layer = parts.layer
    count, experts, k = _sample(parts, tokens, k)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, layer.hidden, generator=g).to(layer.up.dtype)
    index = torch.rand(count, experts, generator=g).topk(k, 1).indices
    weight = torch.full((count, k), 1 / k, dtype=x.dtype)
    ranks = torch.rand(count, k * parts.n_sub, generator=g).argsort(1).argsort(1)
    half = (ranks < max(1, k * parts.n_sub // 2)).view(count, k, parts.n_sub)
    one, every = whole_parts(parts), torch.ones(count, k, 1, dtype=torch.bool)
    runs: list[Callable[[], Tensor | None]] = [
        lambda: layer.native(x, index, weight),
        lambda: tiled(one, x, index, weight, every),
        lambda: tiled(parts, x, index, weight, half),
    ]
    return Times(*_fastest(runs))


def _sample(parts: LayerParts, tokens: int, k: int) -> tuple[int, int, int]:
    """Tokens, experts and experts per token of a measurement: a part of all, in which an expert has as many rows."""
    layer = parts.layer
    weights = (3 if layer.gate is not None else 2) * layer.hidden * layer.width
    touched = min(layer.num_experts, tokens * k) * weights * layer.up.element_size()
    part = max(1.0, touched / SAMPLE_BYTES, tokens * k * weights / SAMPLE_WORK)
    fewer = min(part, k)  # a part of every token's experts first, then of the tokens
    own = max(1, round(k / fewer))
    count = max(1, round(tokens * fewer / part))
    return count, max(own, round(layer.num_experts / max(part, fewer))), own


def _fastest(runs: list[Callable[[], Tensor | None]]) -> list[float]:
    """Least seconds of each, taken in turns after one that warms up."""
    found: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # other processes disturb the first less
    while len(found[0]) < TURNS or (sum(map(sum, found)) < ENOUGH and len(found[0]) < 20):
        for run, times in zip(runs, found, strict=True):
            begin = clock()
            run()
            times.append(clock() - begin)
    return [min(times) for times in found]


def whole_parts(parts: LayerParts) -> LayerParts:
    """The layer with one block per expert: what the full budget is computed with, to the bit of all blocks kept."""
    if parts.n_sub == 1:
        return parts
    if parts.whole is None:
        parts.whole = LayerParts(parts.layer, 1, 0)
    return parts.whole  # type: ignore[no-any-return]


def _name(parts: LayerParts, k: int, tokens: int) -> str:
    """What a measurement holds for: machine, threads, library, shape, size."""
    layer = parts.layer
    shape = (
        f"E{layer.num_experts} k{k} d{layer.hidden} f{layer.width} N{parts.n_sub} {str(layer.up.dtype).removeprefix('torch.')}"
    )
    kind = f"{type(layer).__name__}{'' if layer.gate is None else ' gated'}{'' if layer.up_bias is None else ' biased'}"
    return f"{_processor()} {TARGET.name} threads{torch.get_num_threads()} torch{torch.__version__} {kind} {shape} T{tokens}"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-prism" / "layer-times.json"


def _kept() -> dict[str, Times]:
    """What this machine knows; nothing where the file is missing or is not ours."""
    try:
        return {name: Times(*map(float, values)) for name, values in json.loads(_file().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(name: str, found: Times) -> Times:
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

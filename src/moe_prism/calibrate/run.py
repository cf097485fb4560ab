"""The pass: run the model over the windows, let collectors see every MoE layer's input, choices and weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CorruptError, DoesNotFit
from ..model import MoELayer
from ..model.router import Router
from . import collectors as registry
from .base import Collector, RoutedBatch
from .gradients import SLOPE, next_token_loss, slopes_flow
from .residual import watch_residual
from .statistics import LayerStatistics, Statistics

PROFILE_TOKENS = 8192  # of the windows that are kept
Progress = Callable[[int, int], None]
"""(windows done, windows in all)."""


class Batch(NamedTuple):
    """Windows that run together: ids [n, length], the number of the first, and their domain."""

    ids: Tensor
    first: int
    domain: str


def batches(
    ids: Tensor, size: int, parts: Sequence[tuple[str, int]] = (), done: int = 0, stop: int | None = None
) -> Iterator[Batch]:
    """Windows ids [n, length] after the first `done`, at most `size` at a time and never of two domains; parts: (domain, windows).

    stop: the number of a window that a batch begins with, which is not run any more.
    """
    ends = list(accumulate(rows for _, rows in parts)) or [len(ids)]
    while done < (len(ids) if stop is None else stop):
        place = bisect_right(ends, done)
        batch = ids[done : min(done + size, ends[place])]
        yield Batch(batch, done, parts[place][0] if parts else "")
        done += len(batch)


def profile_windows(ids: Tensor) -> Tensor:
    """Some of the windows, evenly spaced, for later runs of the whole model."""
    return ids[:: max(1, -(-ids.numel() // PROFILE_TOKENS))].contiguous()


@dataclass(frozen=True)
class Settings:
    """capacity: reservoir tokens per expert; memory_bytes bounds what all collectors hold together; batch: windows per forward.

    domains: of the text; of each, what collectors with `has_domains` gather is kept by itself.
    """

    collectors: tuple[str, ...] = ("counts", "tokens")
    capacity: int = 2048
    memory_bytes: int = 4 << 30
    batch: int = 8
    seed: int = 0
    domains: tuple[str, ...] = ()

    def gathered(self) -> list[str]:
        """What is gathered: the name of a collector, or domain/name where each domain has its own."""
        keyed = [n for n in self.collectors if self.domains and registry.get(n).has_domains]
        return [*(f"{d}/{n}" for d in self.domains for n in keyed), *(n for n in self.collectors if n not in keyed)]

    @property
    def goes_back(self) -> bool:
        """Whether some collector needs a backward pass."""
        return any(SLOPE in registry.get(name).needs for name in self.collectors)

    @property
    def size(self) -> int:
        """Windows that run together."""
        return 1 if self.goes_back else self.batch


def declared_bytes(layers: Sequence[MoELayer], settings: Settings, capacity: int) -> int:
    """What the collectors may hold together, by their own declaration."""
    makers = [registry.get(name) for name in map(_collector, settings.gathered())]
    return sum(m.bytes_per_layer(layer, capacity) for m in makers for layer in layers)


def bounded_capacity(layers: Sequence[MoELayer], settings: Settings) -> int:
    """The largest capacity <= settings.capacity whose declared memory fits. Raises DoesNotFit below 64 tokens per expert."""
    capacity = settings.capacity
    while declared_bytes(layers, settings, capacity) > settings.memory_bytes and capacity > 64:
        capacity = max(64, capacity * 3 // 4)
    if declared_bytes(layers, settings, capacity) > settings.memory_bytes:
        raise DoesNotFit(
            f"64 tokens per expert need {declared_bytes(layers, settings, 64) / 2**20:.0f} MiB, "
            f"the limit is {settings.memory_bytes / 2**20:.0f} MiB",
            "raise --memory-mib",
        )
    return capacity


class Pass:
    """A calibration that can be stopped after any batch and continued from `state()`."""

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], settings: Settings) -> None:
        self.model, self.layers, self.settings = model, layers, settings
        self.capacity = bounded_capacity(layers, settings)
        self.collectors: list[dict[str, Collector]] = [self.fresh(layer) for layer in layers]
        self.done = 0  # windows
        self.domain = ""  # that of the batch which runs
        self.profile = torch.zeros(0, 1, dtype=torch.long)

    def fresh(self, layer: MoELayer) -> dict[str, Collector]:
        """A layer's collectors, which have seen nothing."""
        return {key: self._new(layer, _collector(key)) for key in self.settings.gathered()}

    def _new(self, layer: MoELayer, name: str) -> Collector:
        return registry.get(name)(layer, capacity=self.capacity, seed=self.settings.seed)

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        progress: Progress | None = None,
        after_batch: Callable[[], None] | None = None,
        parts: Sequence[tuple[str, int]] = (),
        span: tuple[int, int] | None = None,
    ) -> None:
        """ids [n, length]. Continues after the `done` windows; the layers' own computation is untouched.

        parts: (domain, windows) in their order; a batch never holds two, so that each is summed as if it were alone. span: the windows
        that are run, between two beginnings of a batch; None: all.
        """
        self.profile = profile_windows(ids)
        start, stop = span or (0, len(ids))
        self.done = max(self.done, start)
        with self.watched(range(len(self.layers)), ids.shape[1]):
            for batch in batches(ids, self.settings.size, parts, self.done, stop):
                self.done, self.domain = batch.first, batch.domain
                self._through(batch.ids.to(input_device(self.model)))
                self.done += len(batch.ids)
                if progress:
                    progress(self.done, len(ids))
                if after_batch:
                    after_batch()

    def _through(self, ids: Tensor) -> None:
        """Forward, and back again where somebody needs that: a window at a time, because its logits are there as well then."""
        if not self.settings.goes_back:
            backbone_of(self.model)(input_ids=ids, use_cache=False)
            return
        with slopes_flow(self.model):
            next_token_loss(self.model, ids).backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def watched(self, numbers: Sequence[int], length: int) -> Iterator[None]:
        """Have the collectors of these layers see what runs inside the block, in windows of this length."""
        with ExitStack() as stack:
            for layer, mine in ((self.layers[i], self.collectors[i]) for i in numbers):
                layer.install(self._observer(layer, mine, length, self._views(layer, stack)))
                stack.callback(layer.uninstall)
            yield

    def _views(self, layer: MoELayer, stack: ExitStack) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """What the collectors need to see beside the layer's call: field of `RoutedBatch` -> its value for the layer's input."""
        needs = {name for maker in self.settings.collectors for name in registry.get(maker).needs}
        views: dict[str, Callable[[Tensor], Tensor | None]] = {}
        if layer.num_experts > 1 and "scores" in needs:
            last = stack.enter_context(Router(self.model, layer).watched())
            views["scores"] = lambda _x: last()
        if layer.num_experts > 1 and "residual" in needs:
            views["residual"] = stack.enter_context(watch_residual(self.model, layer))
        return views

    def _observer(
        self, layer: MoELayer, mine: dict[str, Collector], window: int, views: dict[str, Callable[[Tensor], Tensor | None]]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def observe(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            if not torch.isfinite(x).all():
                raise CorruptError(
                    f"non-finite input at '{layer.name}'", "the weights or the text are damaged; run `moe-prism verify`"
                )
            more = {name: view(x) for name, view in views.items()}
            routed = RoutedBatch(x.detach(), index, weight.detach(), self.done * window, window, **more)
            wanted = [collector for key, collector in mine.items() if key.rpartition("/")[0] in ("", self.domain)]
            told(routed, [collector for collector in wanted if SLOPE not in collector.needs])
            out = layer.stock(x, index, weight)
            later = [collector for collector in wanted if SLOPE in collector.needs]
            if later:
                out.register_hook(lambda slope: told(replace(routed, slope=slope), later))  # type: ignore[no-untyped-call]
            return out

        @torch.no_grad()
        def told(routed: RoutedBatch, those: Sequence[Collector]) -> None:
            for collector in those:
                collector.update(routed)

        return observe

    def statistics(self, facts: dict[str, Any] | None = None) -> Statistics:
        """What the collectors have gathered so far."""
        layers = [self.gathered(i) for i in range(len(self.layers))]
        return Statistics(layers, self.profile, {"capacity": self.capacity, "windows": self.done, **(facts or {})})

    def gathered(self, number: int) -> LayerStatistics:
        """What the collectors of one layer have gathered so far."""
        layer, mine = self.layers[number], self.collectors[number]
        found = LayerStatistics(layer.name, {})
        for name in self.settings.collectors:
            if name in mine:
                found.values[name] = mine[name].state()
                continue
            whole = self._new(layer, name)
            for domain in self.settings.domains:
                own = found.domains.setdefault(domain, {})[name] = mine[f"{domain}/{name}"].state()
                whole.merge(own)
            found.values[name] = whole.state()
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything gathered, and how far the pass is; `load` on a new one goes on bit-identically."""
        flat = {
            f"{i}/{key}.{k}": v.contiguous()
            for i, mine in enumerate(self.collectors)
            for key, collector in mine.items()
            for k, v in collector.state().items()
        }
        return {"done": torch.tensor([self.done]), **flat}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what an interrupted pass had gathered."""
        self.done = int(state["done"])
        for i, mine in enumerate(self.collectors):
            for key, collector in mine.items():
                prefix = f"{i}/{key}."
                collector.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _collector(key: str) -> str:
    return key.rpartition("/")[2]


def backbone_of(model: Any) -> Any:
    """The decoder without its language-model head: calibration needs no logits, which are the largest tensor of a pass."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else getattr(model, model.base_model_prefix, model)


def input_device(model: Any) -> torch.device:
    """The device on which a model wants its token ids."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

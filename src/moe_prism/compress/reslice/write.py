"""A checkpoint with its sub-experts as experts of their own.

Sub-expert n of expert e is its n-th block of neurons and becomes expert e N + n. Its router row is its expert's, and its output is
multiplied by the factor that `proof` finds. So a token that takes all k N of its sub-experts gets what k experts gave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite
from ...checkpoint.convert import ADVICE, place, stored
from ...checkpoint.dtypes import NAMES, TORCH
from ...checkpoint.mtp import mtp_layers
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...model.router import Router
from ..prune.remove import block_tensors, row_tensors
from ..prune.write import Planned, Progress, ShardWriter, by_owner, config_text, write_checkpoint
from ..slice.mask import per_neuron
from .form import ReslicedConfig, Sizes
from .proof import factor_of, fill, repeated

ELASTIC = "keep the elastic form, which runs every family"


class ReslicedCheckpoint(ShardWriter):
    """What becomes of every tensor of a source. UsageError for a family that cannot be written like this, before a shard is."""

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], sizes: Sizes) -> None:
        self.stream, self.layers, self.sizes = stream, layers, sizes
        self.routers = [Router(stream.model, layer) for layer in layers]
        self._check()
        self.form = ReslicedConfig(stream, layers, sizes)
        self.targets = [Router(self.form.model, layer) for layer in self.form.layers]
        self._owned = [set(block_tensors(stream, layer)) for layer in layers]
        self._home = [stream.source.info(min(names)).shard for names in self._owned]
        self._shapes = [{name: tuple(t.shape) for name, t in self._named(self._state(i)).items()} for i in range(len(layers))]
        with stream.module(self.routers[0].name):
            self.factor = self._proved(0)

    def _check(self) -> None:
        for router in self.routers:
            if refusal := router.refusal():
                raise UsageError(f"this form cannot be written: {refusal}", ELASTIC)
        if found := mtp_layers(self.stream, block_tensors(self.stream, self.layers[-1])):
            raise UsageError(
                f"'{found[0].root.rstrip('.')}' is a layer for multi-token prediction with experts of its own", ELASTIC
            )

    def write(self, out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`, shard by shard; a finished shard is a unit of `journal`. Peak memory: one block, twice."""
        raw = self.form.raw
        write_checkpoint(self.stream.source, config_text(raw, raw, False), self, out, journal, progress)

    def bytes(self) -> int:
        """Of all that is written."""
        shards = self.stream.source.shards()
        return sum(planned.bytes for shard in shards for planned in self.plan(shard))

    def plan(self, shard: str) -> list[Planned]:
        source = self.stream.source
        everyones = set().union(*self._owned)
        infos = [info for info in source.header(shard).tensors if source.is_read(info) and info.name not in everyones]
        found = [Planned(info, info.shape, None) for info in infos]
        for i in (i for i, home in enumerate(self._home) if home == shard):
            for name, shape in self._shapes[i].items():
                found.append(Planned(self._info(i, name, shape), shape, i))
        return found

    def _info(self, i: int, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The entry of a tensor that the source may not have: in the type of its block's, or its own."""
        dtype = self.stream.source.info(name).dtype if name in self._owned[i] else self._expert_dtype(i)
        size = torch.empty(shape, device="meta", dtype=TORCH[dtype]).nbytes
        return TensorInfo(name, dtype, shape, self._home[i], 0, size)

    def _expert_dtype(self, i: int) -> str:
        experts = self.stream.disk_names(self.layers[i].name)
        return self.stream.source.info(experts[0]).dtype

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        return by_owner(shard, tensors, self.stream.source.stored, self._made)

    def read_back(self, folder: Path) -> None:
        """The first layer of what was written, as transformers loads it, has these experts and routes to all of an expert's."""
        written = LayerStream(folder, self.stream.dtype)
        layer = find_layers(written.model)[0]
        router = Router(written.model, layer)
        with self.stream.module(self.routers[0].name), written.module(router.name), torch.no_grad():
            exact = all(torch.equal(a, b) for a, b in zip(self._views(0), per_neuron(layer), strict=True))
            if not exact or factor_of(self.routers[0], router, self.sizes.n_sub) != self.factor:
                raise UsageError(f"the experts of '{layer.name}' do not come back through transformers", ADVICE)

    def _views(self, i: int) -> list[Tensor]:
        """What belongs to single neurons, as the sub-experts of a layer that is loaded have it. [E N, f / N, ...] each."""
        layer, n = self.layers[i], self.sizes.n_sub
        found = [view.reshape(layer.num_experts * n, layer.width // n, *view.shape[2:]) for view in per_neuron(layer)]
        down = 1 if layer.gate is None else 2
        found[down] = found[down] * self.factor
        return found

    def _made(self, i: int) -> Mapping[str, Tensor]:
        """The tensors of a block as they are written, by their names on disk."""
        with self.stream.module(self.routers[i].name):
            if self._proved(i) != self.factor:
                raise UsageError(f"the routers of '{self.layers[0].name}' and '{self.layers[i].name}' weigh otherwise", ELASTIC)
        with self.stream.module(self.routers[i].name, disk_dtype=True), self._filled(i) as state:
            found = {name: tensor.clone() for name, tensor in self._named(state).items()}
        for name, tensor in found.items():
            check_finite(name, tensor, self.stream.source.folder.name)
            wanted = self._info(i, name, tuple(tensor.shape))
            if (NAMES[tensor.dtype], self._shapes[i].get(name)) != (wanted.dtype, tuple(tensor.shape)):
                raise UsageError(f"tensor '{name}' comes back with another type or shape than it has on disk", ADVICE)
        return found

    def _proved(self, i: int) -> int:
        """The factor of a layer whose block is loaded."""
        before = fill(self.routers[i], self.form.model, self.sizes.n_sub)
        try:
            return factor_of(self.routers[i], self.targets[i], self.sizes.n_sub)
        finally:
            for name, tensor in before:
                place(self.form.model, name, tensor)

    @contextmanager
    def _filled(self, i: int) -> Iterator[dict[str, Tensor]]:
        """The state of the new layer with the source's weights, which are loaded, in it."""
        model, n = self.form.model, self.sizes.n_sub
        old, new = self.layers[i], self.form.layers[i]
        loaded = dict(self.stream.state(self.routers[i].name))
        dims, empty, before = row_tensors(self.routers[i]), self._state(i), dict(stored(model))
        with ExitStack() as stack, torch.no_grad():
            for name, tensor in empty.items():
                stack.callback(place, model, name, before[name])
                own = loaded[name]
                inside = name.startswith(f"{old.name}.")
                value = torch.empty(tensor.shape, dtype=own.dtype) if inside else repeated(own, dims[name], n)
                place(model, name, nn.Parameter(value, requires_grad=False) if isinstance(before[name], nn.Parameter) else value)
            for a, b in zip(self._views(i), per_neuron(new), strict=True):
                b.copy_(a)
            if old.down_bias is not None and new.down_bias is not None:  # added once per sub-expert, N times per expert
                new.down_bias.copy_(repeated(old.down_bias, 0, n) * (self.factor / n))
            yield self._state(i)

    def _state(self, i: int) -> dict[str, Tensor]:
        """The experts and router rows of the new layer by their full names."""
        wanted, kept = row_tensors(self.routers[i]), set(self.stream.model.state_dict())
        return {name: t.detach() for name, t in stored(self.form.model) if name in wanted and name in kept}

    def _named(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.stream.disk_form(state)

"""Constants written in the place of experts: the checkpoint again in the form that vLLM 0.33 reads (`checkpoint.constant`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite
from ...checkpoint.constant import CONFIG_KEY, VALUE, expert_name, layer_number
from ...checkpoint.convert import ADVICE
from ...checkpoint.mtp import mtp_layers
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...options.prune import MTPMode
from .choice import KeptExperts
from .remove import Removal, block_tensors
from .write import Planned, ShardWriter, config_text, text_section, write_checkpoint

ONE_TENSOR = "use --form removed; vLLM's constant experts want a tensor of its own for every matrix of every expert"


def check_substitutable(stream: LayerStream, layers: Sequence[MoELayer], mtp: MTPMode | None) -> None:
    """UsageError where the files of a model, or what is asked of its MTP layers, leave no room for constants."""
    if mtp == "prune":
        raise UsageError("--form constant leaves the number of experts as it is, in MTP layers too", "use --mtp keep or drop")
    for layer in layers:
        names = stream.disk_names(layer.name)
        parts = [expert_name(name) for name in names]
        for name, part in zip(names, parts, strict=True):
            if part is None or layer_number(part[0]) < 0:
                raise UsageError(f"tensor '{name}' is not of one expert of one numbered layer", ONE_TENSOR)
        if {part[1] for part in parts if part} != set(range(layer.num_experts)):
            raise UsageError(f"the experts of '{layer.name}' have no tensors of their own", ONE_TENSOR)
    raw = stream.source.config()
    section = text_section(stream.model.config, stream.model.config.get_text_config(decoder=True), raw)
    if section is not raw and section is not raw.get("text_config"):
        raise UsageError(f"config.json of '{stream.source.folder}' has no place for '{CONFIG_KEY}' that vLLM reads", ONE_TENSOR)


def substitute_experts(
    stream: LayerStream,
    layers: Sequence[MoELayer],
    choices: Sequence[KeptExperts],
    out: OutputFolder,
    journal: Journal,
    how: Removal | None = None,
) -> None:
    """Copy stream's checkpoint to `out.work` with the constants of every choice instead of the experts that go.

    What stays keeps its name and its bytes, the router is untouched; config.json lists the rest. As `remove_experts` otherwise: shard by
    shard, resumable, and the first changed layer is read back before anything is visible.
    """
    how = how or Removal()
    check_substitutable(stream, layers, how.mtp)
    writer = _Writer(stream, layers, choices, how.mtp)
    config = _config(stream, writer.gone, how.mtp == "drop")
    write_checkpoint(stream.source, config, writer, out, journal, how.progress)


class _Writer(ShardWriter):
    """gone: {decoder layer: ids}. A constant lies in the shard of the first tensor of its expert."""

    def __init__(
        self, stream: LayerStream, layers: Sequence[MoELayer], choices: Sequence[KeptExperts], mtp: MTPMode | None
    ) -> None:
        self.stream, self.layers, self.choices = stream, layers, choices
        dropped = mtp_layers(stream, block_tensors(stream, layers[-1])) if mtp == "drop" else []
        self._left = {name for layer in dropped for name in layer.tensors}
        self._owner = {name: i for i, layer in enumerate(layers) for name in stream.disk_names(layer.name)}
        self._vectors: dict[str, Tensor] = {}
        self.gone = {_number(layer): choice.gone for layer, choice in zip(layers, choices, strict=True) if choice.gone}

    def plan(self, shard: str) -> list[Planned]:
        found = []
        for info in self.stream.source.header(shard).tensors:
            if not self.stream.source.is_read(info) or info.name in self._left:
                continue
            part, owner = expert_name(info.name), self._owner.get(info.name)
            if owner is None or part is None or part[1] in self.choices[owner].kept:
                found.append(Planned(info, info.shape, None))
                continue
            name = f"{part[0]}.{part[1]}.{VALUE}"
            if name not in self._vectors:
                vector = self._vectors[name] = self._vector(owner, part[1]).to(info.torch_dtype)
                entry = TensorInfo(name, info.dtype, tuple(vector.shape), shard, 0, vector.nbytes)
                found.append(Planned(entry, entry.shape, owner))
        return found

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        for t in tensors:
            data = self._vectors[t.info.name] if t.owner is not None else self.stream.source.stored(t.info)
            check_finite(t.info.name, data, shard)
            yield t, data

    def read_back(self, folder: Path) -> None:
        """Load the first changed layer of what was written as we would; UsageError if it is not what was meant."""
        i = next((i for i, choice in enumerate(self.choices) if choice.gone), None)
        if i is None:
            return
        choice, name = self.choices[i], self.layers[i].name
        written = LayerStream(folder)
        with self.stream.module(name, disk_dtype=True) as module:
            wanted = {n: p.detach()[list(choice.kept)] for n, p in module.named_parameters(recurse=False)}
        wanted[VALUE] = torch.stack([self._vector(i, e) for e in choice.gone])
        with written.module(find_layers(written.model)[i].name, disk_dtype=True) as module:
            for n, tensor in wanted.items():
                if not torch.equal(getattr(module, n).float(), tensor.to(getattr(module, n).dtype).float()):
                    raise UsageError(f"'{n}' of '{name}' does not come back from what was written", ADVICE)

    def _vector(self, layer: int, expert: int) -> Tensor:
        choice = self.choices[layer]
        assert choice.constants is not None
        return choice.constants.tensor()[choice.gone.index(expert)]


def _number(layer: MoELayer) -> int:
    return layer_number(layer.name)


def _config(stream: LayerStream, gone: dict[int, tuple[int, ...]], drop_mtp: bool) -> bytes:
    raw = stream.source.config()
    raw.pop("auto_map", None)
    section = text_section(stream.model.config, stream.model.config.get_text_config(decoder=True), raw)
    section[CONFIG_KEY] = {str(layer): list(ids) for layer, ids in gone.items()}
    return config_text(raw, section, drop_mtp)

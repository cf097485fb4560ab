"""The tensors of a dense model, a decoder layer at a time, and the files of its split."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import LayerStream, OutputFolder, copy_companions
from ...checkpoint.convert import disk_state
from ...checkpoint.shards import INDEX
from ...errors import UsageError
from ...model import MoELayer, load_tokenizer
from .target import OTHER

_DECODER = re.compile(r"^(.+\.layers\.\d+)\.")


class DenseTensors:
    """By their names on disk, in the type they are written in: of a folder, or of a model that came from a GGUF file."""

    def __init__(
        self, where: Path, stream: LayerStream | None, model: Any, layers: Sequence[MoELayer], written: torch.dtype
    ) -> None:
        """where: the folder or file that companions come from. UsageError for names that are not Llama's."""
        self.where, self.stream, self.model, self.written = where, stream, model, written
        state = {} if stream else disk_state(model)
        self._held: dict[str, Tensor] = state
        names = stream.source.names() if stream else list(state)
        known = set(model.state_dict())
        self.left_out = sorted(set(names) - known)
        self.names = [name for name in names if name in known]
        self.blocks = [layer.name for layer in layers]
        wanted = {f"{block}.{matrix}_proj.weight" for block in self.blocks for matrix in ("gate", "up", "down")}
        inside = {name for name in self.names if name.startswith(tuple(f"{block}." for block in self.blocks))}
        if inside != wanted:
            raise UsageError(f"the MLPs hold '{min(inside ^ wanted)}'", OTHER)

    def type_of(self, name: str) -> torch.dtype:
        """What a tensor is written in."""
        return self.stream.source.info(name).torch_dtype if self.stream else self.written

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is written."""
        if self.stream:
            return self.stream.source.stored(self.stream.source.info(name))
        return self._held[name].to(self.written).clone()

    def beside(self, layer: int | None) -> list[str]:
        """Names outside the MLPs: of the decoder layer around one of them, or (None) of none."""
        prefixes = [home(block) for block in self.blocks]
        inside = tuple(f"{block}." for block in self.blocks)
        others = [name for name in self.names if not name.startswith(inside)]
        if layer is None:
            return [name for name in others if home(name) not in prefixes]
        return [name for name in others if home(name) == prefixes[layer]]

    def copy_companions(self, out: OutputFolder) -> None:
        """Tokenizer, generation settings and whatever else travels."""
        if self.stream:
            copy_companions(self.where, out, self.stream.source)
            return
        if getattr(self.model, "generation_config", None) is not None:
            out.write_bytes("generation_config.json", self.model.generation_config.to_json_string(use_diff=True).encode())
        before = {path.name for path in out.work.iterdir()}
        load_tokenizer(self.where).save_pretrained(out.work)
        for path in sorted(out.work.iterdir()):
            if path.name not in before:
                out.write_bytes(path.name, path.read_bytes())  # again, through fsync and the hash list


def home(name: str) -> str:
    """The decoder layer that a tensor or a module is in; empty for none."""
    found = _DECODER.match(f"{name}.")
    return found[1] if found else ""


def shard_name(number: int, count: int) -> str:
    """Of the files of a split, counted from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(out: OutputFolder, shards: Sequence[Sequence[str]], size: int) -> None:
    """The index of shards, each with the names it holds. size: bytes of all tensors."""
    places = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    out.write_bytes(INDEX, (json.dumps(content, indent=2) + "\n").encode())

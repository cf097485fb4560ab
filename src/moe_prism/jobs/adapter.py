"""An adapter from a fine-tuned checkpoint and its base, and a model that wears some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.file import TENSORS, Adapter, base_digest, names, packed, read_adapter, write_adapter
from ..artefact.output import check_apart
from ..artefact.source import Weights
from ..checkpoint import DequantizedSource
from ..checkpoint.atomic import check_output
from ..compress.quantize.decoded import matrices
from ..elastic.adapters import Adapters
from ..elastic.runtime import elastic_of
from ..errors import UsageError
from ..model import MoELayer, resolve
from ..options.adapter import AdapterOptions
from ..progress import Report, silent
from ..result import Result
from ..schema.adapter import AdapterForm, PackedForm

SHOWN = 3  # names of other tensors that an error tells


@dataclass(frozen=True)
class MadeAdapter(Result):
    """folder: the adapter's; layers: tuned experts of each; bytes: of its tensors; whole_bytes: the same as whole weights in their type.

    left_out: tensors beside experts that the fine-tune changed too.
    """

    folder: Path
    form: AdapterForm
    bytes: int
    whole_bytes: int
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `adapter --json` prints."""
        counts = [len(own) for own in self.form.layers]
        return {
            "folder": str(self.folder),
            "base": self.form.base,
            "experts": sum(counts),
            "per_layer": counts,
            "packed": self.form.packed is not None,
            "bytes": self.bytes,
            "whole_bytes": self.whole_bytes,
            "left_out": list(self.left_out),
        }


def make_adapter(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    options: AdapterOptions | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> MadeAdapter:
    """Write the experts of the checkpoint `tuned` that differ from `base`, which it was fine-tuned from, as an adapter.

    One layer of each is in memory at a time. Raises UsageError where nothing differs, where the two are not of one shape, or where more
    than experts differs and `options.experts_only` is not set.

    >>> import moe_prism
    >>> moe_prism.make_adapter("nano", "nano", "adapter")
    Traceback (most recent call last):
    moe_prism.errors.UsageError: 'nano' has the experts of its base; give the fine-tuned checkpoint first
    """
    options = options or AdapterOptions()
    options.check()
    check_output(out, force=force)
    here, there = resolve(tuned), resolve(base)
    if here.is_file() or there.is_file():
        raise UsageError("an adapter is made from folders of safetensors", "convert the GGUF file first")
    for source in (here, there):
        check_apart(source, out)
    pair = _Pair(Weights(here), Weights(there), tuned, base)
    others = pair.others()
    if others and not options.experts_only:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UsageError(
            f"'{tuned}' changed {', '.join(others[:SHOWN])}{more} too, and an adapter holds experts alone",
            "fine-tune experts alone, or leave the rest out with --experts-only",
        )
    form = None if options.pack is None else PackedForm(codec="compeft", keep=options.pack, size=options.pack_size)
    tensors: dict[str, Tensor] = {}
    chosen: list[list[int]] = []
    whole = 0
    with report("comparing experts") as update:
        for i in range(len(pair.tuned.layers)):
            experts, own, size = pair.layer(i, form)
            chosen.append(experts)
            tensors |= own
            whole += size
            update(i + 1, len(pair.tuned.layers))
    if not any(chosen):
        raise UsageError(f"'{tuned}' has the experts of its base", "give the fine-tuned checkpoint first")
    first = pair.base.layers[0]
    facts = {
        "name": here.name[:256],
        "base": base_digest(there),
        "experts": first.num_experts,
        "hidden": first.hidden,
        "width": first.width,
        "gated": first.gate is not None,
        "packed": form,
        "layers": chosen,
    }
    made = write_adapter(Path(out), facts, tensors, force=force)
    size = (Path(out) / TENSORS).stat().st_size
    return MadeAdapter(Path(out), made, size, whole, tuple(others))


@dataclass(frozen=True)
class _Pair:
    """A fine-tune and its base, layer by layer."""

    tuned: Weights
    base: Weights
    tuned_name: str | Path
    base_name: str | Path

    def __post_init__(self) -> None:
        shapes = [[(o.num_experts, o.hidden, o.width, o.gate is None) for o in each.layers] for each in (self.tuned, self.base)]
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            raise UsageError(
                f"'{self.tuned_name}' and '{self.base_name}' are not of one shape in all layers", "give a fine-tune and its base"
            )
        for name, each in ((self.tuned_name, self.tuned), (self.base_name, self.base)):
            if each.stream is not None and isinstance(each.stream.source, DequantizedSource):
                raise UsageError(f"'{name}' is quantized", "give the plain checkpoints")

    def others(self) -> list[str]:
        """Tensors beside experts' weights that are not the same, or are not in both."""
        mine, theirs = (each.stream for each in (self.tuned, self.base))
        assert mine is not None and theirs is not None
        experts = {
            n for s, w in ((mine, self.tuned), (theirs, self.base)) for o in w.layers for p in o.owners for n in s.disk_names(p)
        }
        found = sorted((set(mine.source.names()) | set(theirs.source.names())) - experts)
        return [n for n in found if not (_has(mine, n) and _has(theirs, n) and torch.equal(_read(mine, n), _read(theirs, n)))]

    def layer(self, number: int, form: PackedForm | None) -> tuple[list[int], dict[str, Tensor], int]:
        """(tuned experts, their tensors, bytes as whole weights) of a layer."""
        mine, theirs = self.tuned.layers[number], self.base.layers[number]
        with self.tuned.loaded(mine), self.base.loaded(theirs):
            _no_other_parts(mine, theirs, str(self.tuned_name))
            new, old = matrices(mine), matrices(theirs)
            differs = torch.stack([(a != b).flatten(1).any(1) for a, b in zip(new, old, strict=True)]).any(0)
            experts = differs.nonzero()[:, 0].tolist()
            tensors: dict[str, Tensor] = {}
            size = 0
            dtype = self._stored(mine)
            for name, a, b in zip(names(mine.gate is not None), new, old, strict=True) if experts else ():
                key, own = f"layers.{number}.{name}", a[experts].contiguous()
                size += own.numel() * dtype.itemsize
                if form is None:
                    tensors[key] = own.to(dtype)
                else:
                    tensors |= {f"{key}.{part}": t for part, t in packed(form, own - b[experts]).items()}
        return experts, tensors, size

    def _stored(self, layer: MoELayer) -> torch.dtype:
        stream = self.tuned.stream
        assert stream is not None
        return stream.source.info(stream.disk_names(layer.name)[0]).torch_dtype


def _no_other_parts(mine: MoELayer, theirs: MoELayer, name: str) -> None:
    """UsageError where experts' biases differ: an adapter holds matrices."""
    pairs = ((mine.gate_bias, theirs.gate_bias), (mine.up_bias, theirs.up_bias), (mine.down_bias, theirs.down_bias))
    if any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs):
        raise UsageError(
            f"'{name}' changed the biases of experts, and an adapter holds matrices alone", "fine-tune matrices alone"
        )


def _has(stream: Any, name: str) -> bool:
    return name in stream.source.names()


def _read(stream: Any, name: str) -> Tensor:
    tensor: Tensor = stream.source.tensor(name)
    return tensor


@contextmanager
def with_adapters(model: Any, folder: str | Path, adapters: Mapping[str, str | Path], room: int = 0) -> Iterator[Adapters]:
    """Inside, an elastic model of this folder has these adapters: name -> folder of each. `Adapters.at(name)` runs one.

    room: further experts of each layer that may be loaded. Raises UsageError for adapters of another model.

    >>> import moe_prism
    >>> model, tokenizer = moe_prism.load("elastic")
    >>> with moe_prism.with_adapters(model, "elastic", {}, room=2) as adapters:
    ...     adapters.bytes
    0
    """
    made = add_adapters(model, folder, {name: read_adapter(where) for name, where in adapters.items()}, room)
    try:
        yield made
    finally:
        made.detach()


def add_adapters(model: Any, folder: str | Path, read: Mapping[str, Adapter], room: int) -> Adapters:
    """The same for as long as the model lives."""
    elastic = elastic_of(model)
    layers = len(elastic.layers)
    for name, adapter in read.items():
        if len(adapter.form.layers) != layers:
            raise UsageError(
                f"adapter '{name}' is of a model with {len(adapter.form.layers)} MoE layers, this one has {layers}",
                "make it from a fine-tune of this model",
            )
    needed = [room + sum(len(adapter.form.layers[i]) for adapter in read.values()) for i in range(layers)]
    base = base_digest(resolve(folder))
    for name, adapter in read.items():
        if adapter.form.base != base:  # before anything is moved
            raise UsageError(
                f"adapter '{name}' was made for other weights than '{folder}'", "make it from a fine-tune of this model"
            )
    made = Adapters(elastic, base, needed)
    try:
        for name, adapter in read.items():
            made.load(name, adapter)
    except BaseException:
        made.detach()
        raise
    return made

"""An adapter's folder: adapter.json says what it is, adapter.safetensors holds the tuned experts, whole or as packed differences.

Names of the tensors: `layers.<i>.<gate|up|down>` [n, o, i] of the n tuned experts of layer i in rising order, in the type of the fine-tune;
packed `....codes` uint8 [n, o, ceil(i / 5)] and `....size` float32 [n], which `codec.largest_signs` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import OutputFolder, read_header
from ..checkpoint.atomic import sha256_file
from ..checkpoint.links import inside
from ..checkpoint.manifest import MANIFEST, parse_manifest
from ..checkpoint.tensors import check_finite, read_tensor
from ..compress.codec import Plane, Planes
from ..compress.codec.largest_signs import LargestSigns
from ..errors import CorruptError, UsageError
from ..schema import read_form
from ..schema.adapter import AGAIN, AdapterForm, PackedForm
from ..schema.read import JsonBounds

FACTS, TENSORS = "adapter.json", "adapter.safetensors"
BITS, GROUP = 1.6, 32
FLOATS = ("F32", "BF16", "F16")
WEIGHTS = ("*.safetensors", "*.gguf")
OURS = ("prism.safetensors",)
"""Beside weights: the same model with other side tensors takes the same adapters."""


@dataclass(frozen=True)
class Adapter:
    """Read from a folder, and checked: what `form` says is what `tensors` are."""

    form: AdapterForm
    tensors: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """Two adapters of the same digest compute the same."""
        return hashlib.sha256(f"{self.form.base}{self.form.tensors}{self.form.layers}{self.form.packed}".encode()).hexdigest()

    @property
    def stored_bytes(self) -> int:
        """Of its tensors on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def written(self, layer: int, matrix: int, base: Tensor) -> Tensor:
        """[n, o, i]: what the tuned experts of a layer have in the place of the base's [n, o, i]. matrix: 0.. in the order of `names`."""
        name = f"layers.{layer}.{names(self.form.gated)[matrix]}"
        if self.form.packed is None:
            return self.tensors[name].to(base)
        codec = LargestSigns(keep=self.form.packed.keep, size=self.form.packed.size)
        parts = {part: self.tensors[f"{name}.{part}"] for part in ("codes", "size")}
        delta = codec.decode(Planes(tuple(base.shape), GROUP, [Plane(BITS, parts)]), BITS)
        return (base.float() + delta.to(base.device)).to(base.dtype)


def names(gated: bool) -> tuple[str, ...]:
    """The matrices of an expert, as `decoded.matrices` orders them."""
    return ("gate", "up", "down") if gated else ("up", "down")


def packed(form: PackedForm, delta: Tensor) -> dict[str, Tensor]:
    """What is stored of differences [n, o, i]: codes and size."""
    codec = LargestSigns(keep=form.keep, size=form.size)
    return dict(codec.encode(delta, BITS, GROUP).planes[0].tensors)


def write_adapter(out: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, force: bool = False) -> AdapterForm:
    """A folder of this adapter. facts: the fields of `AdapterForm` without kind, version and tensors. UsageError if OUT exists."""
    with OutputFolder(out, force=force) as folder:
        digest = folder.save_tensors(TENSORS, tensors)
        form = AdapterForm(kind="adapter", version=1, tensors=digest, **facts)
        folder.write_bytes(FACTS, form.model_dump_json().encode() + b"\n")
        folder.finish()
    return form


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter of a folder. UsageError where there is none, CorruptError for files that are damaged or do not fit each other."""
    path = Path(folder)
    if not (path / FACTS).is_file():
        raise UsageError(f"'{folder}' has no {FACTS}", "give a folder that `moe-prism adapter` wrote")
    form = read_form(AdapterForm, inside(path / FACTS), AGAIN, JsonBounds(bytes=16 << 20))
    file = path / TENSORS
    if not file.is_file():
        raise CorruptError(f"'{folder}' has no {TENSORS}", AGAIN)
    wanted = _wanted(form)
    header = read_header(inside(file))
    found = {info.name: info for info in header.tensors}
    wrong = next((name for name in (*wanted, *found) if name not in found or name not in wanted), None)
    if wrong is not None:
        raise CorruptError(f"{file}: tensor '{wrong[:80]}' is {'missing' if wrong in wanted else 'not known'}", AGAIN)
    for name, (shape, types) in wanted.items():
        if found[name].shape != shape or found[name].dtype not in types:
            raise CorruptError(
                f"{file}: tensor '{name}' is {found[name].dtype}{list(found[name].shape)}, not {'/'.join(types)}{list(shape)}",
                AGAIN,
            )
    if sha256_file(file) != form.tensors:
        raise CorruptError(f"{file} was changed: its sha256 is not that of {FACTS}", AGAIN)
    tensors = {name: read_tensor(file, info) for name, info in found.items()}
    for name, tensor in tensors.items():
        check_finite(name, tensor, TENSORS)
        if tensor.dtype == torch.uint8 and tensor.numel() and int(tensor.max()) >= 3**5:
            raise CorruptError(f"{file}: '{name}' holds a byte that is no five signs", AGAIN)
    return Adapter(form, tensors)


def _wanted(form: AdapterForm) -> dict[str, tuple[tuple[int, ...], Sequence[str]]]:
    """Shape and types of every tensor."""
    found: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {}
    for layer, own in enumerate(form.layers):
        for name in names(form.gated) if own else ():
            outputs, inputs = (form.hidden, form.width) if name == "down" else (form.width, form.hidden)
            key = f"layers.{layer}.{name}"
            if form.packed is None:
                found[key] = ((len(own), outputs, inputs), FLOATS)
            else:
                found[f"{key}.codes"] = ((len(own), outputs, -(-inputs // 5)), ("U8",))
                found[f"{key}.size"] = ((len(own),), ("F32",))
    return found


def base_digest(folder: str | Path) -> str:
    """What says that a folder, or a GGUF file, holds the weights an adapter was made for: one hash over those of its weight files.

    A folder with a prism.json is taken at its word; `verify` says whether that is true. UsageError where there are no weights.
    """
    path = Path(folder)
    files = [path] if path.is_file() else sorted(f for kind in WEIGHTS for f in path.glob(kind) if f.name not in OURS)
    if not files:
        raise UsageError(f"'{folder}' has no weights", "give a folder with safetensors files")
    listed = parse_manifest(path / MANIFEST)["files"] if path.is_dir() and (path / MANIFEST).is_file() else {}
    lines = [f"{f.name} {listed[f.name]['sha256'] if f.name in listed else sha256_file(inside(f))}" for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

"""A quantized checkpoint as the plain one it stands for: the names and shapes the architecture wants, dequantized when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptError, UsageError
from ..registry import choices
from .constant import CompactSource, constant_experts
from .dtypes import NAMES
from .formats import SourceFormat, StoredWeight, source_formats
from .header import RESTORE, Header, TensorInfo, header_text
from .shards import STACKED, Source, read_json

WRITTEN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of `--dtype`."""
SETTINGS = "quantization_config"
MODELOPT = "hf_quant_config.json"
CODES = ("U8", "I8", "I32")


def open_source(folder: str | Path, written: str | None = None) -> Source:
    """The checkpoint in a folder, dequantized if it is a quantized one; with the experts that are left of one with constant experts.

    written: in which type (a name of WRITTEN) its dequantized weights are written again; default the one that config.json names, else
    bf16. UsageError for a format that is not read, by name, and for `written` where nothing is quantized.
    """
    raw = Source(folder)
    settings, constants = quantization(raw.folder), constant_experts(raw.config())
    if settings is not None and constants:
        raise UsageError(f"'{folder}' has constant experts and is quantized", "give it as it was before it was quantized")
    if settings is None:
        if written is not None:
            raise UsageError(f"'{folder}' is not quantized, and its weights keep their type", "leave --dtype out")
        return CompactSource(raw, constants) if constants else raw
    method = settings.get("quant_method")
    if method not in source_formats.names():
        raise UsageError(
            f"'{folder}' is quantized with '{method}', which is not read", choices(str(method), source_formats.names())
        )
    return DequantizedSource(
        raw, source_formats.get(str(method))(settings), WRITTEN[written] if written else _dtype(raw.config())
    )


def quantization(folder: Path) -> dict[str, Any] | None:
    """How a checkpoint is quantized, by its config.json (or that of its text part, or Model-Optimizer's own file); None if it is not."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get(SETTINGS), dict) and part[SETTINGS]:
            found: dict[str, Any] = part[SETTINGS]
            return found
    if (folder / MODELOPT).is_file():
        return {"quant_method": "modelopt"}
    return None


class DequantizedSource(Source):
    """`names`, `info`, `header` and `bytes` are those of the plain checkpoint that `raw` stands for, in the same shards.

    A weight lies in the shard that has its codes; scales, zero points and what says how activations are quantized have no place of
    their own. `left_out`: names of the latter.
    """

    def __init__(self, raw: Source, form: SourceFormat, written: torch.dtype) -> None:
        self.raw, self.form, self.written = raw, form, written
        self.folder, self.index_file = raw.folder, raw.index_file
        self.stored_weights = form.weights(raw)
        codes = {weight.parts["codes"]: (name, weight) for name, weight in self.stored_weights.items()}
        inside = {part for weight in self.stored_weights.values() for part in weight.parts.values()}
        self.left_out = [n for n in raw.names() if n not in inside and n.rpartition(".")[2] in form.beside]
        self._check(inside | set(self.left_out))
        self._infos, self._headers = {}, {}
        for shard in raw.shards():
            self._plan(raw.header(shard), codes, inside | set(self.left_out))

    def tensor(self, name: str) -> Tensor:
        """Dequantized to float32, or as it is on disk."""
        return self._values(name, self.raw.tensor)

    def has_rows(self, name: str) -> bool:
        weight = self.stored_weights.get(name)
        if weight is None:
            return self.raw.has_rows(name)
        counts = {self.raw.info(part).shape[:1] for part in weight.parts.values()}
        return len(weight.shape) >= STACKED and counts == {weight.shape[:1]}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._values(name, lambda part: self.raw.rows(part, first, last))

    def _values(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What the tensors that are read so stand for."""
        weight = self.stored_weights.get(name)
        if weight is None:
            return read(name)
        try:
            matrix = self.form.matrix({role: read(part) for role, part in weight.parts.items()})
            return matrix.values(weight.transposed)
        except UsageError as error:
            raise UsageError(f"tensor '{name}': {error.cause}", error.next_step) from error

    def blocks(self, info: TensorInfo) -> Iterator[bytes]:
        return self.raw.blocks(self.raw.info(info.name))

    def stored(self, info: TensorInfo) -> Tensor:
        return self.tensor(info.name).to(info.torch_dtype)

    def config(self) -> dict[str, Any]:
        """config.json as that of the plain checkpoint."""
        config = self.raw.config()
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.pop(SETTINGS, None)
        config.pop("torch_dtype", None)
        return config | {"dtype": str(self.written).removeprefix("torch.")}

    def config_bytes(self) -> bytes:
        return json.dumps(self.config(), indent=2, ensure_ascii=False).encode() + b"\n"

    def header_bytes(self, shard: str) -> bytes:
        header = self.header(shard)
        return header_text(header.tensors, header.metadata)

    def index_bytes(self) -> bytes:
        weight_map = {name: self.info(name).shard for name in sorted(self.names())}
        total = sum(self.info(name).bytes for name in weight_map)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"

    def facts(self) -> dict[str, Any]:
        """What a manifest says of this source, as JSON values."""
        return {
            "format": self.form.name,
            "dtype": str(self.written).removeprefix("torch."),
            "weights": len(self.stored_weights),
            "left_out": self.left_out,
        }

    def _plan(self, header: Header, codes: Mapping[str, tuple[str, StoredWeight]], gone: set[str]) -> None:
        """The header that the shard has with its weights dequantized; none if nothing would be left of it."""
        rows = []
        for info in filter(self.raw.is_read, header.tensors):
            if info.name in codes:
                name, weight = codes[info.name]
                rows.append((name, NAMES[self.written], weight.shape, torch.Size(weight.shape).numel() * self.written.itemsize))
            elif info.name not in gone:
                rows.append((info.name, info.dtype, info.shape, info.bytes))
        if not rows:
            return
        shard = header.tensors[0].shard
        start = len(header_text([TensorInfo(n, d, s, shard, 0, b) for n, d, s, b in rows], header.metadata))
        tensors, position = [], start
        for name, dtype, shape, size in rows:
            info = TensorInfo(name, dtype, shape, shard, position, position + size)
            if self._infos.setdefault(name, info) is not info:
                raise CorruptError(f"{shard}: tensor '{name}' is there both quantized and plain", RESTORE)
            tensors.append(info)
            position += size
        self._headers[shard] = Header(tuple(tensors), header.metadata, start, position)

    def _check(self, known: set[str]) -> None:
        """CorruptError for codes that have no scales: read as numbers they would be wrong without a word. UsageError for no codes."""
        if not self.stored_weights:
            raise UsageError(
                f"config.json of '{self.folder}' says quantized ({self.form.name}), and no tensor is stored so",
                "restore config.json or the weights from their source",
            )
        for name in self.raw.names():
            info = self.raw.info(name)
            if name not in known and len(info.shape) > 1 and (info.dtype in CODES or info.dtype.startswith(("F8_", "F4"))):
                raise CorruptError(
                    f"{info.shard}: tensor '{name}' is quantized ({info.dtype}) and has no scales beside it", RESTORE
                )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type config.json says the model computes in."""
    for part in (config, config.get("text_config") or {}):
        name = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if name in ("bfloat16", "float16", "float32"):
            return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.bfloat16

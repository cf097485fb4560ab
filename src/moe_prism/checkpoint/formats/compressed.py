"""quant_method "compressed-tensors": what llm-compressor and vLLM's tools write.

Per linear layer `X`, by what is there: `X.weight_packed` int32 (int4 and int8, densely packed) or uint8 (two FP4 codes per byte),
or `X.weight` in int8 or FP8; `X.weight_scale`, `X.weight_zero_point`, and for NVFP4 `X.weight_global_scale`, which scales are divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .bits import WORD_BITS, pack_octets, pack_words, unpack_octets, unpack_words
from .grids import Float4, Float8, Grid, Integers, RoundScale, rounding, scale_values, stored_scales
from .matrix import CodedMatrix, checked

ROLES = {
    "scales": "weight_scale", "zeros": "weight_zero_point", "global": "weight_global_scale", "shape": "weight_shape",
    "g_idx": "weight_g_idx",
}  # fmt: skip
OPTIONAL = ("zeros", "global", "shape", "g_idx")


class CompressedTensors(SourceFormat):
    """Each weight says by its tensors how it is stored, so checkpoints of mixed precision need nothing more."""

    name: ClassVar[str] = "compressed-tensors"
    beside: ClassVar[tuple[str, ...]] = (
        "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale",
    )  # fmt: skip

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if settings.get("sparsity_config", {}).get("format", "dense") not in ("dense", None):
            raise self.refuse(f"sparsity '{settings['sparsity_config']['format']}'")
        if settings.get("transform_config"):
            raise self.refuse("transforms of its activations")
        weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
        blocks = {tuple(w["block_structure"]) for w in weights if w.get("block_structure")}
        self.block = blocks.pop() if len(blocks) == 1 else None

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        for stem, parts in gather(source, "weight_packed", ROLES, OPTIONAL).items():
            info = source.info(parts["codes"])
            if info.dtype == "I32":
                if "shape" not in parts:
                    raise self.refuse("weight_packed but no weight_shape")
                shape = tuple(int(n) for n in source.tensor(parts["shape"]))
                self._bits(shape[-1], info.shape[-1])
            else:
                shape = (*info.shape[:-1], 2 * info.shape[-1])
            found[f"{stem}weight"] = StoredWeight(parts, shape)
        for stem, parts in gather(source, "weight", ROLES, OPTIONAL).items():
            info = source.info(parts["codes"])
            if info.dtype == "I8" or info.dtype.startswith("F8_"):
                found[f"{stem}weight"] = StoredWeight(parts, info.shape)
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes, scales, dtype = parts["codes"], scale_values(parts["scales"]), parts["scales"].dtype
        round_scale: RoundScale = rounding(dtype)
        zeros = parts["zeros"].float() if "zeros" in parts else None
        if codes.dtype == torch.int32:
            return self._packed(parts)
        if "global" in parts:
            share = parts["global"].float()
            scales = scales / share

            def round_scale(s: Tensor) -> Tensor:
                return rounding(dtype)(s * share) / share

        if codes.dtype == torch.uint8:
            return self._grouped(CodedMatrix(unpack_octets(codes, 4), Float4(), scales, (1, 1), round_scale), parts)
        grid: Grid = Integers(-128, 127) if codes.dtype == torch.int8 else Float8(codes.dtype)
        codes = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
        return self._grouped(
            CodedMatrix(codes, grid, scales, (1, 1), round_scale, zeros, None if zeros is None else (-128, 127)), parts
        )

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed, scales = parts["codes"].dtype, matrix.scales
        if "global" in parts:
            scales = scales * parts["global"].float()
        found = {"scales": stored_scales(scales, parts["scales"])}
        if packed == torch.int32:
            bits = self._bits(matrix.codes.shape[-1], parts["codes"].shape[-1])
            found["codes"] = pack_words(matrix.codes, bits)
        elif packed == torch.uint8:
            found["codes"] = pack_octets(matrix.codes, 4)
        else:
            found["codes"] = matrix.codes.view(packed)
        if "zeros" in parts and matrix.zeros is not None:
            found["zeros"] = self._stored_zeros(matrix.zeros, parts)
        return found

    def _packed(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        """Signed integers, stored with half their range added; zero points are packed along the outputs."""
        rows, columns = (int(n) for n in parts["shape"])
        bits = self._bits(columns, parts["codes"].shape[-1])
        half = 1 << (bits - 1)
        codes = unpack_words(parts["codes"], bits)[:, :columns]
        zeros = torch.full_like(parts["scales"], half, dtype=torch.float32)
        if "zeros" in parts and parts["zeros"].dtype == torch.int32:
            zeros = unpack_words(parts["zeros"].T, bits).T[:rows].float()
        elif "zeros" in parts:
            zeros = parts["zeros"].float() + half
        grid, scales = Integers(0, 2 * half - 1), scale_values(parts["scales"])
        zero_range = (grid.low, grid.high) if "zeros" in parts else None
        return self._grouped(CodedMatrix(codes, grid, scales, (1, 1), rounding(parts["scales"].dtype), zeros, zero_range), parts)

    def _stored_zeros(self, zeros: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        if parts["codes"].dtype != torch.int32:
            return zeros.reshape(parts["zeros"].shape).to(parts["zeros"].dtype)
        bits = self._bits(int(parts["shape"][1]), parts["codes"].shape[-1])
        if parts["zeros"].dtype == torch.int32:
            return pack_words(zeros.T.to(torch.uint8), bits).T.contiguous()
        return (zeros - (1 << (bits - 1))).reshape(parts["zeros"].shape).to(parts["zeros"].dtype)

    def _grouped(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> CodedMatrix:
        """The same with its groups, which scales and codes tell by their shapes."""
        rows, columns = matrix.codes.shape[-2:]
        scales = matrix.scales.reshape(1, 1) if matrix.scales.numel() == 1 else matrix.scales
        zeros = matrix.zeros.reshape(scales.shape) if matrix.zeros is not None else None
        if scales.shape[-2] in (1, rows):
            group = (rows // scales.shape[-2], -(-columns // scales.shape[-1]))
        elif self.block:
            group = (int(self.block[0]), int(self.block[1]))
        else:
            raise self.refuse(f"scales of shape {tuple(scales.shape)} for a weight of shape {tuple(matrix.codes.shape)}")
        if "g_idx" in parts and not in_order(parts["g_idx"], group[1]):
            raise self.refuse("act-order (weight_g_idx)")
        return replace(matrix, scales=checked(scales, matrix.codes, group), group=group, zeros=zeros)

    def _bits(self, columns: int, words: int) -> int:
        for bits in (2, 4, 8):
            if -(-columns * bits // WORD_BITS) == words:
                return bits
        raise self.refuse(f"{columns} weights in {words} words of 32 bits")


def in_order(g_idx: Tensor, group: int) -> bool:
    """Whether columns lie group by group: -1 marks an index that was never filled in."""
    wanted = torch.arange(len(g_idx)) // group
    return bool((g_idx == wanted).all() or (g_idx == -1).all())

"""quant_method "fp8": `X.weight` in 8-bit floats, `X.weight_scale_inv` per block of 128 x 128, or one `X.weight_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .grids import Float8, rounding, scale_values, stored_scales
from .matrix import CodedMatrix, checked


class Fp8(SourceFormat):
    """DeepSeek-V3's format, also that of Qwen's and others' FP8 releases. Scales are float32, bfloat16 or powers of two (E8M0)."""

    name: ClassVar[str] = "fp8"
    beside: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale", "k_scale", "v_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if settings.get("fmt", "e4m3") not in ("e4m3", "e5m2"):
            raise self.refuse(f"fmt '{settings['fmt']}'")
        block = settings.get("weight_block_size")
        self.block = (int(block[0]), int(block[1])) if block else None

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        for ends in ("_scale_inv", "_scale"):
            for stem, parts in gather(source, "", {"scales": ends}).items():
                if source.info(stem).dtype.startswith("F8_"):
                    found[stem] = StoredWeight(parts, source.info(stem).shape)
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes, scales, group = parts["codes"], scale_values(parts["scales"]), self.block
        if scales.numel() == 1:
            scales, group = scales.reshape(1, 1), (codes.shape[-2], codes.shape[-1])
        if group is None:
            raise self.refuse(f"scales of shape {tuple(scales.shape)} and no weight_block_size")
        codes, grid = codes.view(torch.uint8), Float8(codes.dtype)
        return CodedMatrix(codes, grid, checked(scales, codes, group), group, rounding(parts["scales"].dtype))

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": matrix.codes.view(parts["codes"].dtype), "scales": stored_scales(matrix.scales, parts["scales"])}

"""quant_method "modelopt": NVFP4 (`X.weight` uint8, `X.weight_scale` FP8 per 16, `X.weight_scale_2`) and FP8 (one `X.weight_scale`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .bits import pack_octets, unpack_octets
from .grids import Float4, Float8, rounding, stored_scales
from .matrix import CodedMatrix, checked

GROUP = 16


class ModelOpt(SourceFormat):
    """NVIDIA Model-Optimizer's unified checkpoints. Its second scale multiplies, where that of compressed-tensors divides."""

    name: ClassVar[str] = "modelopt"
    beside: ClassVar[tuple[str, ...]] = ("input_scale", "k_scale", "v_scale")

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        for stem, parts in gather(source, "weight", {"scales": "weight_scale", "second": "weight_scale_2"}, ("second",)).items():
            info = source.info(parts["codes"])
            if info.dtype == "U8":
                found[f"{stem}weight"] = StoredWeight(parts, (*info.shape[:-1], 2 * info.shape[-1]))
            elif info.dtype.startswith("F8_"):
                found[f"{stem}weight"] = StoredWeight(parts, info.shape)
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes, scales = parts["codes"], parts["scales"].float()
        if codes.dtype == torch.uint8:
            codes, second = unpack_octets(codes, 4), parts["second"].float()
            round_scale = rounding(parts["scales"].dtype)
            scales = checked(scales * second, codes, (1, GROUP))
            return CodedMatrix(codes, Float4(), scales, (1, GROUP), lambda s: round_scale(s / second) * second)
        if scales.numel() > 1:
            raise self.refuse(f"scales of shape {tuple(scales.shape)}")
        group = (codes.shape[-2], codes.shape[-1])
        return CodedMatrix(
            codes.view(torch.uint8), Float8(codes.dtype), scales.reshape(1, 1), group, rounding(parts["scales"].dtype)
        )

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if parts["codes"].dtype == torch.uint8:
            scales = stored_scales(matrix.scales / parts["second"].float(), parts["scales"])
            return {"codes": pack_octets(matrix.codes, 4), "scales": scales}
        return {"codes": matrix.codes.view(parts["codes"].dtype), "scales": stored_scales(matrix.scales, parts["scales"])}

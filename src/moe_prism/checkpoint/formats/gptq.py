"""quant_method "gptq": `X.qweight` [i / 8, o] packed along the inputs, `X.qzeros` [i / g, o / 8], `X.scales` [i / g, o], `X.g_idx` [i]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .bits import WORD_BITS, pack_words, unpack_words
from .compressed import in_order
from .grids import Integers, rounding, stored_scales
from .matrix import CodedMatrix, checked


class Gptq(SourceFormat):
    """AutoGPTQ's and GPTQModel's layout. Version 1 stores zero points less one; act-order is refused, as vLLM does."""

    name: ClassVar[str] = "gptq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.bits = int(settings.get("bits", 4))
        if self.bits not in (2, 4, 8):
            raise self.refuse(f"{self.bits} bits")
        layout = settings.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise self.refuse(f"checkpoint_format '{layout}'")
        self.less = 1 if layout == "gptq" else 0

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        roles = {"scales": "scales", "zeros": "qzeros", "g_idx": "g_idx"}
        for stem, parts in gather(source, "qweight", roles, ("g_idx",)).items():
            words, outputs = source.info(parts["codes"]).shape
            found[f"{stem}weight"] = StoredWeight(parts, (outputs, words * WORD_BITS // self.bits))
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes, scales = unpack_words(parts["codes"].T, self.bits), parts["scales"].float().T
        group = (1, codes.shape[1] // scales.shape[1])
        if "g_idx" in parts and not in_order(parts["g_idx"], group[1]):
            raise self.refuse("act-order (g_idx)")
        high = (1 << self.bits) - 1
        zeros = (unpack_words(parts["zeros"], self.bits).T + self.less) & high
        scales, zeros = checked(scales, codes, group), checked(zeros.float(), codes, group)
        zero_range = None if self.settings.get("sym", True) else (self.less, high)
        return CodedMatrix(codes, Integers(0, high), scales, group, rounding(parts["scales"].dtype), zeros, zero_range)

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert matrix.zeros is not None
        zeros = (matrix.zeros.to(torch.uint8) - self.less) & ((1 << self.bits) - 1)
        return {
            "codes": pack_words(matrix.codes, self.bits).T.contiguous(),
            "zeros": pack_words(zeros.T, self.bits),
            "scales": stored_scales(matrix.scales.T, parts["scales"]),
        }

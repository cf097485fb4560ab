"""quant_method "awq": `X.qweight` [i, o / 8], `X.qzeros` [i / g, o / 8] and `X.scales` [i / g, o]; i inputs, o outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .bits import pack_words, unpack_words
from .grids import Integers, rounding, stored_scales
from .matrix import CodedMatrix, checked

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of eight codes each column lies: the kernel unpacks even and odd ones apart."""


class Awq(SourceFormat):
    """AutoAWQ's `gemm` layout."""

    name: ClassVar[str] = "awq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        bits = settings.get("bits", settings.get("w_bit", BITS))
        if bits != BITS:
            raise self.refuse(f"{bits} bits")
        if str(settings.get("version", "gemm")).lower() != "gemm":
            raise self.refuse(f"version '{settings['version']}'")

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        for stem, parts in gather(source, "qweight", {"scales": "scales", "zeros": "qzeros"}, ("zeros",)).items():
            inputs, words = source.info(parts["codes"]).shape
            found[f"{stem}weight"] = StoredWeight(parts, (words * len(PLACES), inputs))
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes, scales = columns(parts["codes"]).T, parts["scales"].float().T
        zeros = columns(parts["zeros"]).T.float() if "zeros" in parts else torch.full_like(scales, 1 << (BITS - 1))
        group = (1, codes.shape[1] // scales.shape[1])
        scales, zeros = checked(scales, codes, group), checked(zeros, codes, group)
        zero_range = (0, (1 << BITS) - 1) if "zeros" in parts else None
        round_scale = rounding(parts["scales"].dtype)
        return CodedMatrix(codes, Integers(0, (1 << BITS) - 1), scales, group, round_scale, zeros, zero_range)

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"codes": words(matrix.codes.T), "scales": stored_scales(matrix.scales.T, parts["scales"])}
        if "zeros" in parts and matrix.zeros is not None:
            found["zeros"] = words(matrix.zeros.T.to(torch.uint8))
        return found


def columns(packed: Tensor) -> Tensor:
    """int32 [n, o / 8] -> codes [n, o] in the order of the outputs."""
    codes = unpack_words(packed, BITS)
    return codes.reshape(len(packed), -1, len(PLACES))[..., list(PLACES)].flatten(1)


def words(codes: Tensor) -> Tensor:
    """The reverse."""
    order = sorted(range(len(PLACES)), key=lambda column: PLACES[column])
    return pack_words(codes.reshape(len(codes), -1, len(PLACES))[..., order].flatten(1), BITS)

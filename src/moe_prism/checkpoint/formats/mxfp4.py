"""quant_method "mxfp4": gpt-oss. `X_blocks` [E, o, i / 32, 16] holds two codes per byte, `X_scales` [E, o, i / 32] exponents of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..shards import Source
from .base import SourceFormat, StoredWeight, gather
from .bits import pack_octets, unpack_octets
from .grids import Float4, rounding, scale_values, stored_scales
from .matrix import CodedMatrix, checked

GROUP = 32


class Mxfp4(SourceFormat):
    """OCP Microscaling FP4 as OpenAI released it; the model has these weights the other way round, [E, i, o]."""

    name: ClassVar[str] = "mxfp4"

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        found = {}
        for stem, parts in gather(source, "_blocks", {"scales": "_scales"}).items():
            *outer, groups, half = source.info(parts["codes"]).shape
            if half * 2 != GROUP or len(outer) != 2:
                raise self.refuse(f"blocks of {half} bytes")
            found[stem] = StoredWeight(parts, (outer[0], groups * GROUP, outer[1]), transposed=True)
        return found

    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        codes = unpack_octets(parts["codes"].flatten(-2), 4)
        scales = checked(scale_values(parts["scales"]), codes, (1, GROUP))
        return CodedMatrix(codes, Float4(), scales, (1, GROUP), rounding(parts["scales"].dtype))

    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = pack_octets(matrix.codes, 4).reshape(parts["codes"].shape)
        return {"codes": blocks, "scales": stored_scales(matrix.scales, parts["scales"])}

"""MC-SMoE: merged experts as two thin matrices and the rows that they miss most (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ...compress.chain import ChainChange
from ...compress.codec.low_rank_sparse import LowRankSparse
from ...compress.edit import Edit
from ...compress.quantize import QuantizeChange
from ...compress.quantize.decoded import SOURCE
from ...errors import UsageError
from .m_smoe import MSmoe, MSmoeParameters


@dataclass(frozen=True, kw_only=True)
class McSmoeParameters(MSmoeParameters):
    """bits: of 16, the share of a matrix's bytes that is left. sparse: the share of those that goes to rows."""

    bits: float = 4
    sparse: float = 0.25


class McSmoe(MSmoe):
    """`m-smoe`, then W = L R + S of every merged expert: the singular vectors that the bytes pay for, and the rows of the rest that are
    largest. The paper learns which rows, over 50 epochs, and distils; nothing is trained here.
    """

    Parameters = McSmoeParameters
    parameters: McSmoeParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> McSmoeParameters:
        found = cast(McSmoeParameters, super().read_argument(name, text))
        if not 0 <= found.sparse < 1:
            raise UsageError(f"sparse={found.sparse:g} of '{name}' is no share of bytes", "write sparse=0.25")
        codec = LowRankSparse(found.sparse)
        codec.check(found.bits, codec.groups[0])
        return found

    def edit(self, settled: Sequence[Any]) -> Edit:
        codec, bits = LowRankSparse(self.parameters.sparse), float(self.parameters.bits)
        widths = tuple(tuple(SOURCE if held else bits for held in shield.tolist()) for _, shield in settled)
        return ChainChange((super().edit(settled), QuantizeChange(codec, widths, codec.groups[0])))

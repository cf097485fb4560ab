"""What making an adapter is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """Which experts of a fine-tune are kept, and how they are stored.

    >>> import moe_prism
    >>> moe_prism.AdapterOptions(pack=2.0).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --pack 2 is out of range; give more than 0 and at most 1
    """

    experts_only: bool = option(
        False,
        "Leave out what the fine-tune changed beside experts. Without it such a fine-tune is refused: an adapter cannot hold it.",
    )
    pack: float | None = option(
        None,
        "Store the signs of this share of the differences to the base, and one size per matrix (ComPEFT): 0.2 takes about a tenth of the "
        "bytes. Default: whole weights.",
        above=0,
        most=1,
    )
    pack_size: float = option(
        0.0, "With --pack: the size in standard deviations of the differences; 0: the mean of what is kept.", least=0, most=100
    )

    def check(self) -> None:
        super().check()
        if self.pack is None and self.pack_size:
            raise UsageError("--pack-size belongs to --pack", "give --pack 0.2")

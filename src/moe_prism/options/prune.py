"""What pruning is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from .base import DTYPE_WORDS, Options, WrittenType, nested, option
from .calibrate import CalibrateOptions

GroupMode = Literal["per_group", "regroup", "mask", "drop_groups"]
ExpertForm = Literal["removed", "constant"]
MTPMode = Literal["prune", "drop", "keep"]
Allocation = Literal["layer", "global", "measured"]


@dataclass(frozen=True, kw_only=True)
class PruneOptions(Options):
    """Which experts stay, and what ranks them.

    >>> import moe_prism
    >>> moe_prism.PruneOptions(keep=0.5).keep
    0.5
    """

    criterion: str = option(
        "easy-ep",
        "What ranks the experts; see `moe-prism ls methods` (those called prune:NAME).",
        names="moe_prism.compress.prune:criteria",
    )
    keep: float = option(
        0.5, "Share of the experts that stays, 0 to 1; a layer keeps at least as many as a token uses.", above=0, most=1
    )
    form: ExpertForm | None = option(
        None,
        "What is left of an expert that goes. removed: nothing, and its tokens go to others. constant: its mean output, which the router "
        "chooses as before; vLLM 0.33 and newer load this. Default: as the criterion was made for, which is removed but for mone.",
    )
    allocation: Allocation = option(
        "layer",
        "layer: the same number everywhere. global: one ranking over all layers. measured: by what the model loses with each layer "
        "alone pruned. With --form removed the last two are for --report-only and mask mode: such a checkpoint has one number.",
    )
    groups: GroupMode = option(
        "per_group",
        "Of group-limited routers: per_group keeps equally many in each, regroup deals the kept into equal groups, drop_groups "
        "removes whole groups, mask leaves groups unequal (mask mode only).",
    )
    protect: list[str] = option(
        [],
        "Comma-separated protections, e.g. super-experts: experts that stay whatever the criterion says.",
        names="moe_prism.compress.prune:protections",
    )
    for_domain: list[str] = option(
        [],
        "Comma-separated domains of the calibration (--domain) whose experts stay. Default: all of them, each counted alike.",
    )
    mtp: MTPMode | None = option(
        None,
        "Of layers for multi-token prediction, which calibration does not run: prune takes the same experts away as in the last layer, "
        "drop leaves such layers out, keep writes them whole. Needed where the model has such layers with experts.",
    )
    seed: int = option(0, "Of the criterion random.", least=0)
    profile_tokens: int = option(2048, "Of measured: calibration tokens that every layer is run alone on.", least=1)
    keep_format: bool = option(
        False,
        "Write the experts that stay in the source's own quantized format: their bytes are moved, nothing is computed again.",
    )
    dtype: WrittenType | None = option(None, DTYPE_WORDS)
    calibration: CalibrateOptions = nested(CalibrateOptions, "text", "text_field", "domains", "tokens", "length", "low_memory")

    def check(self) -> None:
        super().check()
        if self.keep_format and self.dtype:
            raise UsageError("--dtype writes plain weights, --keep-format does not", "give one of them")
        if self.allocation == "measured" and self.calibration.low_memory:
            raise UsageError("--allocation measured runs the whole model", "leave --low-memory out, or use --allocation global")
        self.calibration.check()

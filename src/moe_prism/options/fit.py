"""What a fit of offloading is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """How much fits, what a layer and a record take, and among what is chosen.

    >>> import moe_prism
    >>> moe_prism.FitOptions(share=2).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --share 2 is out of range; give more than 0 and at most 1
    """

    share: float = option(0.25, "Share of the keys (experts, or sub-experts) that fit into memory.", above=0, most=1)
    layer_ms: float = option(
        1.0,
        "Milliseconds that a layer computes in a step, as `moe-prism offload` measures it.",
        above=0,
    )
    record_ms: float = option(
        1.0, "Milliseconds that one key takes to be read, as `moe-prism offload` measures it. The default is a layer's.", above=0
    )
    first_ms: float = option(
        0.0,
        "Milliseconds that the reads of a layer take beside --record-ms for each, as `moe-prism offload` measures it.",
        least=0,
    )
    busy_ms: float = option(
        0.0, "Of --record-ms, what the computing thread works itself, as `moe-prism offload` measures it.", least=0
    )
    uncompiled_ms: float = option(
        0.0,
        "Milliseconds that a layer takes more where the policy has no compiled table, as `moe-prism offload` measures them. What the "
        "policy's own Python takes is measured here.",
        least=0,
    )
    guess_ms: float = option(
        0.0,
        "Milliseconds that a layer takes to choose what to read ahead, as `moe-prism offload` measures them. What the predictor takes is "
        "measured here.",
        least=0,
    )
    folder: Path | None = option(
        None,
        "The elastic model of the trace: also fit --miss-shares and --prompt-rate, with the loss measured on it. Needs --max-kl.",
    )
    planes: bool = option(
        False,
        "With --folder and --max-kl: for records of planes choose 4 or 8 bits for each expert within that loss (EdgeMoE), in place of "
        "--miss-shares and --prompt-rate.",
    )
    max_kl: float | None = option(
        None,
        "With --folder: how large the KL of calibration text may become where missing experts are read in int8 form or skipped.",
        least=0,
    )
    parts: int | None = option(None, "Keys per expert: 1, or the sub-experts of the trace. Default those of the trace.", least=1)
    policy: list[str] = option(
        [],
        "Only these, see `moe-prism ls cache-policies`. Default all that need not know the future.",
        is_repeated=True,
        names="moe_prism.offload.cache:cache_policies",
    )
    predictor: list[str] = option(
        [],
        "Only these, see `moe-prism ls predictors`; the best is kept, also at width 0. Default all, or none.",
        is_repeated=True,
        names="moe_prism.offload.predict:predictors",
    )

    def check(self) -> None:
        super().check()
        if (self.folder is None) != (self.max_kl is None):
            raise UsageError("--folder and --max-kl belong together", "give both, or neither")
        if self.planes and self.folder is None:
            raise UsageError("--planes fits bits on a model", "give --folder and --max-kl as well")

"""Where a model computes, and in which type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from .base import Options, option

ComputeType = Literal["auto", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32"]

TYPE_WORDS = "Type the model computes in; auto is the one it is stored in. Default: float32 on a CPU, auto on a GPU."


@dataclass(frozen=True, kw_only=True)
class Placement(Options):
    """Of every command that runs a model."""

    dtype: ComputeType | None = option(None, TYPE_WORDS)
    device: str | None = option(None, "Where it computes: cpu, cuda, cuda:1. Default: the first GPU, else the CPU.")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = option(
        None, "Spread it over all GPUs, as accelerate decides. Default: one device."
    )

    def check(self) -> None:
        super().check()
        if self.device and self.device_map:
            raise UsageError("--device and --device-map both say where the model computes", "give one of them")

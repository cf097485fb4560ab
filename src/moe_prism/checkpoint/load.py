"""Load any source where it will compute: plain checkpoints through transformers, quantized folders dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..model import load_model, resolve
from .dequantized import quantization
from .stream import LayerStream


def load_to_run(source: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A model on a GPU in the type it is stored in, else in float32, the fast type of a CPU; or in `dtype`.

    A folder of quantized weights is dequantized by us: what computes here is what `refactor` and `prune` read.
    """
    gpu = torch.cuda.is_available()
    where = resolve(source)
    if isinstance(where, Path) and where.is_dir() and quantization(where):
        model = LayerStream(where, dtype or (None if gpu else torch.float32)).keep_outside([])
        read_generation_config(model, where)
    else:
        model = load_model(source, dtype if gpu else dtype or torch.float32)
    return model.cuda() if gpu else model


def read_generation_config(model: Any, folder: Path) -> None:
    """What `from_pretrained` reads beside the weights."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))

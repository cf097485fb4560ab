"""What a GGUF file says of itself. transformers dequantizes its weights, with the package `gguf`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError


def expert_bytes(file: Path) -> float:
    """Bytes per weight of the experts in a GGUF file; of all matrices where it has no experts."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError("GGUF files need the package gguf", "pip install 'moe-prism[gguf]'") from error
    tensors = GGUFReader(str(file)).tensors
    experts = [t for t in tensors if "_exps" in t.name] or [t for t in tensors if len(t.shape) > 1]
    return round(float(sum(t.n_bytes for t in experts) / sum(int(t.n_elements) for t in experts)), 6)

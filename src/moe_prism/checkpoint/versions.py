"""Versions of this tool and of the libraries, and the device, that decide the bytes it writes."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

LIBRARIES = ("moe-prism", "torch", "transformers", "safetensors", "numpy", "scipy", "numba")


def versions() -> dict[str, str]:
    """By the names under which they are installed."""
    return dict(_found())


@cache
def _found() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def device() -> str:
    """What computes here: the GPU's name, else the vector instructions of the CPU that torch uses."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"

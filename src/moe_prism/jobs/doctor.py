"""What this machine is, and what will work on it."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..cores import cores
from ..kernels.target import TARGET
from ..memory import available_memory
from ..model import find_layers, load_model
from ..result import Findings
from .half_budget import KNOWN, as_json, half_budget, shape_of_model

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "numba", "pydantic")
EXTRAS = {
    "report": ("HTML reports", ("altair", "vl-convert-python", "jinja2")),
    "serve": ("the server", ("fastapi", "uvicorn", "prometheus-client", "psutil")),
    "gguf": ("GGUF files", ("gguf", "accelerate")),
}
"""extra -> (what it is for, packages)."""
GIB = 2**30


def check_machine(model: str | Path | None = None) -> Findings:
    """Processor, memory, libraries, what will work here, and the time of half a budget's experts beside stock transformers'.

    model: a folder with a config.json whose experts are timed too; no weights are read. Takes some seconds.

    >>> import moe_prism
    >>> facts = moe_prism.check_machine()
    >>> facts["half_budget"][0]["half"] > 0, facts.to_records()[0]["ok"]
    (True, True)
    """
    shapes = dict(KNOWN)
    if model is not None:
        shapes[str(model)] = shape_of_model(model)
    return Findings({**_machine(), "half_budget": as_json(list(half_budget(shapes)))}, "checks")


def _machine() -> dict[str, Any]:
    """What this machine has: processor, memory, disk."""
    packages = [name for _, names in EXTRAS.values() for name in names]
    found = {name: _version(name) for name in (*LIBRARIES, *packages, "datasets")}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    layers = find_layers(load_model("nano"))
    checks = [
        {"what": f"prism-nano loads: {len(layers)} MoE layers of {layers[0].num_experts} experts", "ok": True},
        {"what": "experts interface of transformers", "ok": True},
        *({"what": f"{what} (extra: {e})", "ok": all(found[n] for n in names)} for e, (what, names) in EXTRAS.items()),
        {"what": "GPU", "ok": bool(gpus)},
    ]
    facts = {
        "vectors": TARGET.name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "memory": f"{available_memory() / GIB:.1f} GiB free",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / GIB:.1f} GiB free",
        "gpus": ", ".join(gpus) or "none",
    }
    return {"machine": facts, "libraries": found, "checks": checks}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

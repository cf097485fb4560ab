"""`moe-prism doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .output import emit

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "numba")
EXTRAS = {
    "report": ("HTML reports", ("altair", "vl-convert-python", "jinja2")),
    "serve": ("the server", ("fastapi", "uvicorn", "prometheus-client", "psutil", "pydantic", "pyyaml")),
    "gguf": ("GGUF files", ("gguf",)),
}
"""extra -> (what it is for, packages)."""
GIB = 2**30


def doctor(*, json: bool = False) -> None:
    """Show this machine, the installed libraries, and what will work here.

    Parameters
    ----------
    json: One JSON object on stdout.
    """
    facts = machine()
    lines = [f"{key:18} {value}" for key, value in facts["machine"].items()]
    lines += [f"{name:18} {found or 'not installed'}" for name, found in facts["libraries"].items()]
    lines += [f"{'ok' if check['ok'] else 'NO':4} {check['what']}" for check in facts["checks"]]
    emit(facts, "\n".join(lines), json)


def machine() -> dict[str, Any]:
    """What this machine has: processor, memory, disk."""
    import torch

    from ..jobs.refactor_resources import available_memory
    from ..model import find_layers, load_model

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
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
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

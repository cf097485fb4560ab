"""`moe-prism doctor`."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .output import emit

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "numba", "pydantic")
EXTRAS = {
    "report": ("HTML reports", ("altair", "vl-convert-python", "jinja2")),
    "serve": ("the server", ("fastapi", "uvicorn", "prometheus-client", "psutil")),
    "gguf": ("GGUF files", ("gguf", "accelerate")),
}
"""extra -> (what it is for, packages)."""
GIB = 2**30


def doctor(model: Path | None = None, /, *, json: bool = False) -> None:
    """Show this machine, the installed libraries, what will work here, and what half a budget buys in time.

    Parameters
    ----------
    model: A folder with a config.json, whose experts are timed beside those of OLMoE and Qwen3. No weights are read.
    json: One JSON object on stdout.
    """
    from ..jobs.half_budget import KNOWN, as_json, half_budget, shape_of_model

    shapes = dict(KNOWN)
    if model is not None:
        shapes[str(model)] = shape_of_model(model)
    facts = machine()
    found = list(half_budget(shapes))
    facts["half_budget"] = as_json(found)
    lines = [f"{key:18} {value}" for key, value in facts["machine"].items()]
    lines += [f"{name:18} {version or 'not installed'}" for name, version in facts["libraries"].items()]
    lines += [f"{'ok' if check['ok'] else 'NO':4} {check['what']}" for check in facts["checks"]]
    lines += ["", "time of the experts of one layer to that of stock transformers (float32, one thread)"]
    lines += [f"{f.shape:18} {f.tokens:3} tokens  full budget {f.full:.2f}, half {f.half:.2f}" for f in found]
    emit(facts, "\n".join(lines), json)


def machine() -> dict[str, Any]:
    """What this machine has: processor, memory, disk."""
    import torch

    from ..cores import cores
    from ..jobs.resources import available_memory
    from ..kernels.target import TARGET
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

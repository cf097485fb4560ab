"""Peak memory of `refactor --low-memory` on a quantized checkpoint several times larger: forecast, limit, and what was used.

    python benchmarks/quantized_memory.py [--form fp8|mxfp4] [--layers 46]

Random weights. The command runs under RLIMIT_DATA = its own forecast (`--dry-run`); a MemoryError would end it. Baseline in the same
run: the float32 weights that a run in memory holds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.tiny_sources import save_tiny

EXPERTS, HIDDEN, WIDTH, BLOCK = 16, 512, 1024, 128
FLAGS = ["--low-memory", "--tokens", "512", "--length", "64", "--reservoir", "64", "--solver", "greedy", "--json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="fp8", choices=("fp8", "mxfp4"))
    parser.add_argument("--layers", type=int, default=46)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        weights = build(root / "q", given.form, given.layers)
        needed = run(root, "--dry-run")["peak_memory_bytes"]
        used = run(root, limit=needed)["peak_rss_bytes"]
        mib = 1 << 20
        print(f"{given.form}: {weights * 4 // mib} MiB of float32 weights, {weights * 4 / needed:.1f} times the limit")
        print(f"forecast and limit {needed // mib} MiB, peak {used // mib} MiB, {used / needed:.2f} of the forecast")


def run(root: Path, *flags: str, limit: int | None = None) -> Any:
    """What the command prints as JSON."""
    command = [sys.executable, "-m", "moe_prism", "refactor", str(root / "q"), "-o", str(root / "out"), *FLAGS, *flags]

    def bound() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=bound)
    if done.returncode:
        raise SystemExit(done.stderr[-800:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def build(folder: Path, form: str, layers: int) -> int:
    """A quantized checkpoint, one shard per layer; returns its number of expert weights."""
    family = "olmoe" if form == "fp8" else "gpt_oss"
    changes = {"num_experts": EXPERTS} if form == "fp8" else {"num_local_experts": EXPERTS, "head_dim": 128}
    types = {} if form == "fp8" else {"layer_types": ["full_attention"] * layers}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": layers}
    names = save_without_experts(family, folder, {**changes, **types, **sizes})
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]} if form == "fp8" else {"quant_method": "mxfp4"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for layer in range(layers):
        tensors = fp8_experts(layer) if form == "fp8" else mxfp4_experts(layer)
        shard = f"experts-{layer:03d}.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"})
        names |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return layers * EXPERTS * 3 * HIDDEN * WIDTH


def save_without_experts(family: str, folder: Path, changes: dict[str, Any]) -> dict[str, str]:
    """The rest of the model; name -> shard."""
    small = {**changes, "intermediate_size": 32}
    save_tiny(family, folder, shard="10GB", dtype=torch.bfloat16, **small)
    from safetensors.torch import load_file

    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "rest.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": changes["intermediate_size"]}))
    return dict.fromkeys(tensors, "rest.safetensors")


def fp8_experts(layer: int) -> dict[str, torch.Tensor]:
    found = {}
    for expert in range(EXPERTS):
        for name, shape in (("gate_proj", (WIDTH, HIDDEN)), ("up_proj", (WIDTH, HIDDEN)), ("down_proj", (HIDDEN, WIDTH))):
            stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
            found[stem] = (torch.randn(shape) * 40).to(torch.float8_e4m3fn)
            found[f"{stem}_scale_inv"] = torch.full((shape[0] // BLOCK, shape[1] // BLOCK), 5e-4)
    return found


def mxfp4_experts(layer: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        stem = f"model.layers.{layer}.mlp.experts.{name}"
        found[f"{stem}_blocks"] = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
        found[f"{stem}_scales"] = torch.full((EXPERTS, rows, columns // 32), 120, dtype=torch.uint8)
        found[f"{stem}_bias"] = torch.zeros(EXPERTS, rows, dtype=torch.bfloat16)
    return found


if __name__ == "__main__":
    main()

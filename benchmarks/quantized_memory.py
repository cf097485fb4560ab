"""Peak memory of `refactor --low-memory` on a quantized checkpoint several times larger: forecast, limit, and what was used.

    python benchmarks/quantized_memory.py [--forms fp8,mxfp4] [--layers 52]
    python benchmarks/quantized_memory.py --forms fp8 --layers 165 --low-only --solver contiguous   # 4 times the limit on disk too

Random weights. The command runs under RLIMIT_DATA = its own forecast (`--dry-run`); a MemoryError would end it. Baseline in the same
run: the same command without --low-memory and without a limit, which holds the weights in float32. Both must write the same bytes.
All windows are one batch in both, so that sums have one order. --low-only leaves the baseline out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.tiny_sources import save_tiny

EXPERTS, HIDDEN, WIDTH, BLOCK = 4, 1024, 2048, 128
FLAGS = ["--tokens", "128", "--length", "64", "--reservoir", "64", "--profile-tokens", "0", "--json"]
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="fp8,mxfp4")
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--solver", default="greedy")
    parser.add_argument("--low-only", action="store_true")
    given = parser.parse_args()
    for form in given.forms.split(","):
        with tempfile.TemporaryDirectory() as work:
            for line in measure(Path(work), form, given):
                print(line, flush=True)


def measure(root: Path, form: str, given: argparse.Namespace) -> Iterator[str]:
    """Lines of figures for one format."""
    held = build(root / "q", form, given.layers) * 4
    stored = sum(file.stat().st_size for file in (root / "q").glob("*.safetensors"))
    flags = ["--solver", given.solver]
    needed = run(root, "low", *flags, "--low-memory", "--dry-run")["peak_memory_bytes"]
    yield f"{form}: {stored // MIB} MiB on disk, {stored / needed:.1f} times the limit"
    yield f"{held // MIB} MiB of float32 weights, {held / needed:.1f} times"
    used = run(root, "low", *flags, "--low-memory", limit=needed)["peak_rss_bytes"]
    yield f"forecast and limit {needed // MIB} MiB, peak {used // MIB} MiB, {used / needed:.2f} of the forecast"
    if given.low_only:
        return
    low = hashes(root / "low")
    whole = run(root, "whole", *flags)["peak_rss_bytes"]
    same = sum(low[name] == found for name, found in hashes(root / "whole").items())
    yield f"in memory: peak {whole // MIB} MiB, {used / whole:.2f} times that; {same} of {len(low)} files of weights are equal to the bit"


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(root: Path, out: str, *flags: str, limit: int | None = None) -> Any:
    """What the command prints as JSON."""
    command = [sys.executable, "-m", "moe_prism", "refactor", str(root / "q"), "-o", str(root / out), *FLAGS, *flags]

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

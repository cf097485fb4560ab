"""Refactoring a large model on this machine: time, memory and disk of a cut with true shapes, against what was forecast.

    python benchmarks/scale.py [--shapes qwen3-30b] [--layers 3] [--experts N] [--tokens 65536] [--as-if 8GiB] [--json]
    python benchmarks/scale.py --needed [--shapes qwen3-30b,deepseek-v3] [--for-machine ram=24GiB]   # memory and disk, nothing is run

A cut is the first layers of a model with random bfloat16 weights and nano's tokenizer; its vocabulary is cut to that. `refactor
--low-memory` runs on it as a process of its own. Seconds of a layer are measured; those of the whole model are that times its layers, and
with `--experts` fewer experts are solved per layer, so the seconds of solving are scaled to all of them. Random weights prove time and
memory, and no quality. --needed says what a cut and the whole model need: their files are headers over holes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe_prism.artefact.source import Weights
from moe_prism.checkpoint.convert import disk_state
from moe_prism.jobs.expert_memory import MAPPED
from moe_prism.jobs.needed_by_refactor import needed_by
from moe_prism.jobs.resources import SIZED_FOR
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.machine import OtherMachine
from moe_prism.options.refactor import RefactorOptions
from tests.tiny_sources import NANO

SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3-30b": (
        "qwen3_moe", 48,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128},
    ),
    "qwen3-235b": (
        "qwen3_moe", 94,
        {"hidden_size": 4096, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
         "num_key_value_heads": 4, "head_dim": 128},
    ),
    "gpt-oss-120b": (
        "gpt_oss", 36,
        {"hidden_size": 2880, "moe_intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 64},
    ),
    "deepseek-v3": (
        "deepseek_v3", 58,
        {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
         "topk_group": 4, "first_k_dense_replace": 0, "num_attention_heads": 128, "num_key_value_heads": 128},
    ),
}  # fmt: skip
"""Family, MoE layers of the whole model, configuration."""
ENTRY = "import sys; from moe_prism.cli import main; sys.exit(main(sys.argv[1:]))"
AS_IF = "from moe_prism.jobs import expert_memory; expert_memory.free_memory = lambda: {}; "


def config_of(shape: str, layers: int | None = None, experts: int | None = None) -> Any:
    """The configuration of a cut, with nano's vocabulary; of all layers and experts where no number is given."""
    family, whole, sizes = SHAPES[shape]
    nano = json.loads((NANO / "config.json").read_text())
    key = experts_key(shape)
    sizes = {
        **sizes,
        key: experts or sizes[key],
        "num_hidden_layers": layers or whole,
        "intermediate_size": sizes["moe_intermediate_size"],
    }
    special = {name: nano[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(family, **sizes, **special)


def experts_key(shape: str) -> str:
    """What the family calls the number of its experts."""
    return next(name for name in SHAPES[shape][2] if name in ("num_experts", "n_routed_experts", "num_local_experts"))


def build(folder: Path, shape: str, layers: int, experts: int | None) -> int:
    """Write the cut; returns how many experts a layer of it has."""
    config = config_of(shape, layers, experts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    for file in NANO.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return int(getattr(config, experts_key(shape)))


def needed(shape: str, layers: int | None, asked: argparse.Namespace) -> dict[str, Any]:
    """What `refactor --low-memory` says that it needs; no weight is written or read."""
    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        folder, config = Path(place), config_of(shape, layers, asked.experts)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
        config.save_pretrained(folder)
        header, at = {}, 0
        for name, tensor in disk_state(model).items():
            kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + at)
        options = RefactorOptions(
            calibration=CalibrateOptions(tokens=asked.tokens, low_memory=True), profile_tokens=asked.profile_tokens
        )
        SIZED_FOR.set(OtherMachine.of(asked.for_machine) if asked.for_machine else None)
        return {"shape": shape, "layers": config.num_hidden_layers, **needed_by(Weights(folder), options)}


class Ran(NamedTuple):
    """A command: what it says, its peak memory in bytes, seconds on the clock and of processors, and its lines of progress.

    held: the most of the memory that nobody can drop; pages of mapped files, and of libraries, are not in it.
    """

    said: dict[str, Any]
    peak: int
    held: int
    wall: float
    cpu: float
    lines: str


def run(arguments: list[str], as_if: str | None = None) -> Ran:
    """as_if: so much memory, for the choice of where experts lie."""
    entry = ENTRY if as_if is None else AS_IF.format(OtherMachine.of(f"ram={as_if}").ram) + ENTRY
    command = [sys.executable, "-c", entry, *arguments, "--json"]
    began, before, held = time.monotonic(), _cpu(), [0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        watch = threading.Thread(target=_watch, args=(child, held))
        watch.start()
        said, lines = child.communicate()
        watch.join()
        if child.returncode:
            raise SystemExit(lines[-800:])
    found = json.loads(said)
    return Ran(found, found.get("peak_rss_bytes", 0), held[0], time.monotonic() - began, _cpu() - before, lines)


def _watch(child: subprocess.Popen[str], held: list[int]) -> None:
    """Keep the largest size of a process's own pages."""
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        found = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.M)
        held[0] = max(held[0], int(found[1]) << 10 if found else 0)
        time.sleep(0.02)


def _cpu() -> float:
    """Processor seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    if args.work:
        Path(args.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        source, out = Path(place) / "source", Path(place) / "out"
        experts = build(source, shape, args.layers, args.experts)
        asked = ["refactor", str(source), "-o", str(out), "--low-memory", "--tokens", str(args.tokens), "--text", "stdlib"]
        asked += ["--solver", args.solver, "--profile-tokens", str(args.profile_tokens)]
        forecast = run([*asked, "--dry-run"], args.as_if).said
        done = run(asked, args.as_if)
        layers = [float(found) for found in re.findall(r"^layers: \d+/\d+ \((\d+) s\)", done.lines, re.M)]
        disk = sum(file.stat().st_size for file in out.iterdir())
        whole, sizes = SHAPES[shape][1:]
        if forecast.get(MAPPED):  # the file without a name that was there beside the output: three matrices per expert in float32
            disk += experts * 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"] * 4
        return {
            "shape": shape,
            "layers": args.layers,
            "experts": experts,
            "reservoir": forecast["reservoir_tokens"],
            "seconds": done.wall,
            "seconds_forecast": forecast["seconds"],
            "cpu": done.cpu,
            "cpu_forecast": forecast["cpu_seconds"],
            "layer_seconds": layers[-1] / args.layers if layers else None,
            "hours": layers[-1] / args.layers * whole / 3600 if layers else None,
            "peak": done.peak,
            "peak_forecast": forecast["peak_memory_bytes"],
            "held": done.held,
            MAPPED: bool(forecast.get(MAPPED)),
            "disk": disk,
            "disk_forecast": forecast["disk_bytes"],
            "starved": done.said["starved_experts"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, help="per layer, instead of the shape's own")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--profile-tokens", type=int, default=4096)
    parser.add_argument("--solver", default="alt")
    parser.add_argument("--work", help="where there is disk, default the system's folder for temporary files")
    parser.add_argument("--as-if", help="so much memory were free, such as 8GiB: experts that do not fit into it lie on disk")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--needed", action="store_true")
    parser.add_argument("--for-machine", help="with --needed: such as ram=24GiB,cores=8; default what is free here")
    args = parser.parse_args()
    if args.needed:
        for shape in args.shapes.split(","):
            for layers in (args.layers, None):
                row = needed(shape, layers, args)
                sizes = "  ".join(
                    f"{k.removesuffix('_bytes')} {v / 2**30:.1f} GiB" for k, v in row.items() if k.endswith("_bytes")
                )
                where = ", experts on disk" if row.get(MAPPED) else ""
                print(f"{shape}, {row['layers']} layers, sample {row['reservoir_tokens']}{where}: {sizes}", flush=True)
        return
    rows = [measure(args, shape) for shape in args.shapes.split(",")]
    if args.json:
        print(json.dumps({"benchmark": "scale", "cores": len(os.sched_getaffinity(0)), "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['shape']}: {row['layers']} layers of {row['experts']} experts, sample {row['reservoir']}, {row['starved']} starved"
        )
        print(f"  {row['seconds']:.0f} s, {row['layer_seconds']:.0f} of a layer, {row['hours']:.1f} h for the whole model")
        for name in ("cpu", "seconds"):
            told, took = row[f"{name}_forecast"], row[name]
            print(f"  {name} {took:.0f} s, said {told} ({(told or 0) / took:.2f})")
        for name in ("peak", "disk"):
            said, found = row[f"{name}_forecast"], row[name]
            print(f"  {name} {found / 2**20:.0f} MiB, said {said / 2**20:.0f} ({said / found:.2f})")
        where = "experts on disk, whose pages are in the peak" if row[MAPPED] else "experts in memory"
        print(f"  held {row['held'] / 2**20:.0f} MiB without pages of files; {where}")


if __name__ == "__main__":
    main()

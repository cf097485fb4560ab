"""What `--dry-run` says of long commands, their memory and their time, against what they took.

    python benchmarks/memory.py [--model nano] [--tokens 4096] [--only "refactor,compress rtn"] [--json]

Every run is a process of its own. Its peak is the largest resident set that the system saw of it. The bars: never more memory than was
said, and at least 1/1.15 of it; time within 25 %. On a machine that others use, processor time is what compares. The jobs that need an
elastic folder take the one that the first job wrote. --model olmoe: two layers in the shape of OLMoE-1B-7B, random, 2 GB on disk;
qwen3-30b:3 and the like: so many layers of a shape of scale.py, with :N of so many experts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scale import SHAPES, build

ENTRY = "import sys; from moe_prism.cli import main; sys.exit(main(sys.argv[1:]))"
JOBS: dict[str, tuple[str, ...]] = {
    "refactor": ("refactor", "{model}", "-o", "elastic", "--tokens", "{tokens}"),
    "refactor --low-memory": ("refactor", "{model}", "-o", "low", "--tokens", "{tokens}", "--low-memory"),
    "calibrate": ("calibrate", "{model}", "-o", "statistics", "--tokens", "{tokens}"),
    "refactor --calibration": ("refactor", "{model}", "-o", "again", "--calibration", "statistics", "--tokens", "{tokens}"),
    "prune": ("prune", "{model}", "-o", "half", "--keep", "0.5", "--tokens", "{tokens}"),
    "adopt": ("adopt", "quantized", "--from", "elastic", "-o", "adopted", "--tokens", "{tokens}"),
    "recover": ("recover", "elastic", "-o", "repaired", "--tokens", "{tokens}"),
    "skip": ("skip", "{model}", "--mean", "2", "--tokens", "{tokens}"),
    "frontier": ("frontier", "elastic", "-o", "report", "--compare", "threshold", "--per-method", "3", "--tokens", "{tokens}"),
    "compress heapr": ("compress", "{model}", "-o", "narrow", "--method", "heapr", "--keep", "0.75", "--tokens", "{tokens}"),
    "compress rtn": ("compress", "{model}", "-o", "packed", "--method", "rtn:bits=4:group=128"),
    "trace": ("trace", "{model}", "-o", "trace.npz", "--tokens", "{tokens}"),
}


class Used(NamedTuple):
    """The peak of a process's resident set in bytes; its seconds on the clock, and of processors."""

    peak: int
    wall: float
    cpu: float


def run(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Any], Used]:
    """What a command says as JSON, and what it used."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", ENTRY, *arguments, "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {child.returncode}: {said.strip()}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return json.loads(said), Used(peak, time.perf_counter() - begin, used.ru_utime + used.ru_stime)


def rows(model: str, tokens: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """A row per job, in the order of JOBS."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = str(random_olmoe(folder / "olmoe")) if model == "olmoe" else model
        shape, _, sizes = model.partition(":")
        if shape in SHAPES:
            layers, _, experts = sizes.partition(":")
            # in a process of its own: a child that is forked counts what its parent held as its own peak
            asked = (folder / "cut", shape, int(layers or 3), int(experts) if experts else None)
            building = multiprocessing.get_context("spawn").Process(target=build, args=asked)
            building.start()
            building.join()
            model = str(folder / "cut")
        for name, words in JOBS.items():
            first = ("refactor",) if any("elastic" in JOBS[each] for each in only) else ()
            if only and name not in (*only, *first):
                continue
            if name == "adopt":
                copy_weights(folder / "elastic", folder / "quantized")
            arguments = [word.format(model=model, tokens=tokens) for word in words]
            said, _ = run([*arguments, "--dry-run"], folder)
            said = said.get("needed", said)
            _, used = run(arguments, folder)
            parts = {key: value for key, value in said.items() if key.endswith("_bytes")}
            times = {"said_s": said["seconds"], "wall_s": used.wall, "said_cpu_s": said["cpu_seconds"], "cpu_s": used.cpu}
            found.append({"job": name, "said": said["peak_memory_bytes"], "peak": used.peak, **times, "parts": parts})
            show(found[-1])
    return found


def show(row: dict[str, Any]) -> None:
    said, peak, cpu = row["said"], row["peak"], row["said_cpu_s"]
    line = f"{row['job']:24} memory {said / 2**20:7.0f} MiB said, {peak / 2**20:7.0f} taken, {said / peak:.2f}"
    if cpu is not None:
        line += f"; processors {cpu:5.1f} s said, {row['cpu_s']:5.1f} taken, {cpu / row['cpu_s']:.2f}"
        line += f"; clock {row['said_s']:5.1f}, {row['wall_s']:5.1f}, {row['said_s'] / row['wall_s']:.2f}"
    print(line, file=sys.stderr)


def random_olmoe(out: Path) -> Path:
    """Two layers in the shape of OLMoE-1B-7B, bfloat16, with nano's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from moe_prism.model import load_tokenizer

    config = OlmoeConfig(num_hidden_layers=2)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    load_tokenizer("nano").save_pretrained(out)
    return out


def copy_weights(elastic: Path, out: Path) -> None:
    """What a tool that quantizes would leave of an elastic folder: here the same weights."""
    out.mkdir()
    for file in elastic.iterdir():
        if file.name not in ("prism.json", "prism.safetensors", "README.md") and file.is_file():
            (out / file.name).write_bytes(file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", default="", help="names of jobs, with commas")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    found = rows(model, args.tokens, [name for name in args.only.split(",") if name])
    if args.json:
        print(json.dumps({"benchmark": "memory", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

"""Peak memory of long commands against what `--dry-run` says they need.

    python benchmarks/memory.py [--model nano] [--tokens 4096] [--only refactor,frontier] [--json]

Every run is a process of its own. Its peak is the largest resident set that the system saw of it. The bar: never more than was said, and
at least 1/1.15 of it. The jobs that need an elastic folder take the one that the first job wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "trace": ("trace", "{model}", "-o", "trace.npz", "--tokens", "{tokens}"),
}


def run(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Any], int]:
    """What a command says as JSON, and the peak of its resident set in bytes."""
    command = [sys.executable, "-c", ENTRY, *arguments, "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {child.returncode}: {said.strip()}")
    return json.loads(said), used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows(model: str, tokens: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """A row per job, in the order of JOBS."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, words in JOBS.items():
            if only and name not in (*only, "refactor"):
                continue
            if name == "adopt":
                copy_weights(folder / "elastic", folder / "quantized")
            arguments = [word.format(model=model, tokens=tokens) for word in words]
            said, _ = run([*arguments, "--dry-run"], folder)
            _, peak = run(arguments, folder)
            parts = {key: value for key, value in said.items() if key.endswith("_bytes")}
            found.append({"job": name, "said": said["peak_memory_bytes"], "peak": peak, "parts": parts})
    return found


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
        return
    for row in found:
        said, peak = row["said"], row["peak"]
        print(f"{row['job']:24} said {said / 2**20:7.0f} MiB, peak {peak / 2**20:7.0f} MiB, said/peak {said / peak:.2f}")


if __name__ == "__main__":
    main()

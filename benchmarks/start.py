"""How long a command takes that has little to do: help, a usage error, a source that is refused, a look at a folder.

    python benchmarks/start.py [--rounds 3] [--only refusal] [--json]

Every run is a process of its own, from its start to its end. Commands are taken in turns with a process that imports torch and
transformers' model classes and nothing else: the ratio is processor time to that. CPU seconds are those of the process and its children.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from moe_prism.model.named import NANO

LIBRARIES = [sys.executable, "-c", "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"]
RECIPE = "model: nano\nsteps:\n  - refactor:\n      out: cut\n      n_subs: 4\n"
TORN = "refusal of a source without one tensor: "
OUT = ("-o", "out")


class Case(NamedTuple):
    """code: that the command ends with; said: what stderr must hold; bar: seconds of the process on a free machine, if there is one."""

    words: tuple[str, ...]
    code: int
    said: str = ""
    bar: float | None = None


CASES = {
    "help": Case(("--help",), 0, bar=0.3),
    "help of a command": Case(("refactor", "--help"), 0, bar=0.3),
    "usage error: unknown flag": Case(("refactor", "nano", *OUT, "--unknown", "1"), 2, "--unknown", 0.5),
    "usage error: out of range": Case(("refactor", "nano", *OUT, "--n-sub", "1"), 2, "--n-sub", 0.5),
    "usage error: unknown name": Case(("refactor", "nano", *OUT, "--solver", "best"), 2, "alt", 0.5),
    "usage error: no such model": Case(("refactor", "nowhere", *OUT), 2, "nowhere", 0.5),
    "usage error: no such folder": Case(("frontier", "nowhere"), 2, "nowhere", 0.5),
    "wrong recipe key": Case(("run", "recipe.yaml"), 2, "n_sub", 1.0),
    "refusal of a file cut short": Case(("refactor", "cut-short", *OUT), 4, "model.safetensors"),
    TORN + "inspect": Case(("inspect", "torn"), 4, "model.safetensors", 5.0),
    TORN + "refactor": Case(("refactor", "torn", *OUT), 4, "model.safetensors", 5.0),
    TORN + "prune": Case(("prune", "torn", *OUT, "--keep", "0.5"), 4, "model.safetensors", 5.0),
    TORN + "frontier": Case(("frontier", "torn", *OUT), 4, "model.safetensors", 5.0),
    TORN + "serve": Case(("serve", "torn"), 4, "model.safetensors", 5.0),
    "inspect nano": Case(("inspect", "nano"), 0),
    "ls solvers": Case(("ls", "solvers"), 0),
    "ls methods": Case(("ls", "methods"), 0),
    "report": Case(("report", "frontier.json"), 4, "frontier.json"),
    "verify": Case(("verify", "nowhere"), 2, "nowhere"),
}


class Spent(NamedTuple):
    """Seconds of one process."""

    wall: float
    cpu: float


def run(command: list[str], folder: Path, code: int = 0, said: str = "") -> Spent:
    """Run to the end. SystemExit where it ends otherwise than it should."""
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode != code or said not in done.stderr:
        raise SystemExit(f"{' '.join(command)}: {done.returncode} {done.stderr[-300:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(wall, cpu)


def prepare(folder: Path) -> None:
    """What the cases are about: nano without its last tensor, nano with a file cut short, a recipe with a wrong key, no frontier."""
    torn, short = (Path(shutil.copytree(NANO, folder / name)) for name in ("torn", "cut-short"))
    tensors = load_file(torn / "model.safetensors")
    del tensors[max(tensors)]
    save_file(tensors, torn / "model.safetensors", {"format": "pt"})
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-9])
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "frontier.json").write_text("{")


def rows(rounds: int, only: str) -> list[dict[str, Any]]:
    wanted = {name: case for name, case in CASES.items() if only in name}
    spent: dict[str, list[Spent]] = {name: [] for name in (*wanted, "libraries")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for _ in range(rounds):
            for name, case in wanted.items():
                spent[name].append(run([sys.executable, "-m", "moe_prism", *case.words], folder, case.code, case.said))
            spent["libraries"].append(run(LIBRARIES, folder))
    libraries = statistics.median(one.cpu for one in spent["libraries"])
    found = []
    for name, runs in spent.items():
        cpu, wall = statistics.median(one.cpu for one in runs), min(one.wall for one in runs)
        bar = wanted[name].bar if name in wanted else None
        found.append({"case": name, "cpu": cpu, "wall": wall, "of_libraries": cpu / libraries, "bar": bar})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = rows(args.rounds, args.only)
    if args.json:
        print(json.dumps({"benchmark": "start", "rows": found}))
        return
    for row in found:
        bar = f", bar {row['bar']:g} s" if row["bar"] else ""
        print(f"{row['case']:52} {row['cpu']:5.2f} CPU s, {row['wall']:5.2f} s, {row['of_libraries']:.2f} of the libraries{bar}")


if __name__ == "__main__":
    main()

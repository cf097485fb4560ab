"""How long a source that is not whole takes to be refused, and what the look costs one that is, against loading it.

    python benchmarks/refuse.py [--json]

On copies of prism-nano, one tensor or file spoiled in each. The look is timed in turns with `from_pretrained` of the same folder.
Commands are processes of their own, from their start to their end, on a folder without one tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_prism.checkpoint import open_whole
from moe_prism.errors import PrismError
from moe_prism.model.named import NANO

ROUNDS = 5
FILE = "model.safetensors"
Edit = Callable[[dict[str, torch.Tensor], str], object]


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = torch.nan


EDITS: dict[str, Edit] = {
    "lost": lambda tensors, name: tensors.pop(name),
    "a row less": lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
    "whole numbers": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}),
    "not a number": _nan,
}


def _cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])


def _no_json(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:8] + b"\xff" + data[9:])


def _number(key: str, change: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: config[key] + change}))

    return damage


FOLDERS: dict[str, Callable[[Path], None]] = {
    "a file cut short": _cut,
    "a header that is no JSON": _no_json,
    "a layer more in config.json": _number("num_hidden_layers", 1),
    "an expert less in config.json": _number("num_experts", -1),
}
COMMANDS = {
    "inspect": ["inspect", "."],
    "refactor": ["refactor", ".", "-o", "../out"],
    "refactor --dry-run": ["refactor", ".", "-o", "../out", "--dry-run"],
    "prune": ["prune", ".", "-o", "../out", "--keep", "0.5"],
    "serve": ["serve", "."],
}
PLACES = ("self_attn.q_proj.weight", "experts.0.down_proj.weight", "mlp.gate.weight", "input_layernorm.weight")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def refusals(folder: Path) -> list[dict[str, Any]]:
    """Seconds until `inspect` has said no, per damage. A value in a large tensor is only seen when it is read, and left out here."""
    whole, rows = load_file(folder / FILE), []
    for kind, edit in EDITS.items():
        for place in PLACES:
            name = next(n for n in whole if n.endswith(place))
            if kind == "not a number" and whole[name].nbytes > 1 << 16:
                continue
            tensors = dict(whole) if kind != "not a number" else {n: t.clone() for n, t in whole.items()}
            edit(tensors, name)
            save_file(tensors, folder / FILE, {"format": "pt"})
            rows.append({"damage": f"{name} {kind}", "seconds": seconds(lambda: refused(folder))})
    save_file(whole, folder / FILE, {"format": "pt"})
    for kind, damage in FOLDERS.items():
        spoiled = Path(shutil.copytree(folder, folder.with_name("spoiled")))
        damage(spoiled)
        rows.append({"damage": kind, "seconds": seconds(lambda there=spoiled: refused(there))})
        shutil.rmtree(spoiled)
    return rows


def commands(folder: Path) -> list[dict[str, Any]]:
    """Seconds until each command has ended, of a folder without the last tensor."""
    tensors = load_file(folder / FILE)
    name = max(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / FILE, {"format": "pt"})
    rows = []
    for kind, words in COMMANDS.items():
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "moe_prism", *words], cwd=folder, capture_output=True, text=True, check=False
        )
        rows.append({"command": kind, "seconds": time.perf_counter() - begin})
        if not done.returncode or name not in done.stderr or FILE not in done.stderr:
            raise SystemExit(f"{kind}: {done.returncode} {done.stderr[-300:]}")
    return rows


def refused(folder: Path) -> None:
    try:
        open_whole(folder)
    except PrismError:
        return
    raise SystemExit(f"{folder} was not refused")


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nano"
        shutil.copytree(NANO, folder)
        looks, loads = [], []
        for _ in range(ROUNDS):
            looks.append(seconds(lambda: open_whole(folder)))
            loads.append(seconds(lambda: AutoModelForCausalLM.from_pretrained(folder)))
        rows, ran = refusals(folder), commands(folder)
    look, load = statistics.median(looks), statistics.median(loads)
    worst = max(row["seconds"] for row in rows)
    return {"look": look, "load": load, "ratio": look / load, "worst_refusal": worst, "rows": rows, "commands": ran}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    found = measure()
    if parser.parse_args().json:
        print(json.dumps({"benchmark": "refuse", **found}))
        return
    print(f"look {found['look']:.3f} s, load {found['load']:.3f} s, ratio {found['ratio']:.2f}")
    print(f"{len(found['rows'])} kinds of damage, worst refusal {found['worst_refusal']:.2f} s")
    print("; ".join(f"{row['command']} {row['seconds']:.2f} s" for row in found["commands"]))


if __name__ == "__main__":
    main()

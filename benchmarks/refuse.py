"""How long a source that is not whole takes to be refused, and what the look costs one that is, against loading it.

    python benchmarks/refuse.py [--json]

On copies of prism-nano, one tensor or file spoiled in each. The look is timed in turns with `from_pretrained` of the same folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
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
from moe_prism.model.load import NANO

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
        rows = refusals(folder)
    look, load = statistics.median(looks), statistics.median(loads)
    return {"look": look, "load": load, "ratio": look / load, "worst_refusal": max(row["seconds"] for row in rows), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    found = measure()
    if parser.parse_args().json:
        print(json.dumps({"benchmark": "refuse", **found}))
        return
    print(f"look {found['look']:.3f} s, load {found['load']:.3f} s, ratio {found['ratio']:.2f}")
    print(f"{len(found['rows'])} kinds of damage, worst refusal {found['worst_refusal']:.2f} s")


if __name__ == "__main__":
    main()

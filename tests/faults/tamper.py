"""Change every file of an artefact in many ways, and use it: `python -m tests.faults.tamper [EXAMPLES]` prints a table.

Each change ends in one line of a `PrismError`, or is accepted because it changes nothing that is computed, or because it is in range and
all hashes are right. Anything else is a defect. Run by test_tampered.py in a process of its own, where compiled code checks its bounds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings

from moe_prism.artefact.load import load
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import Journal, update_manifest
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.errors import PrismError
from moe_prism.forecast.step_cost import Coefficients, CostModel, LayerFacts
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.jobs.prune import select_experts
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.trace import record_trace
from moe_prism.methods.prune.select import read_kept
from moe_prism.model import find_layers
from moe_prism.offload.trace import load_trace
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.options.trace import TraceOptions
from moe_prism.point import FULL, NamedPoint, read_points, write_point
from moe_prism.serve.engine.ladder import find_ladder
from moe_prism.store import StoreOptions
from tests.faults import bounds
from tests.faults.mutations import Mutation, mutations, sign
from tests.tiny_sources import save_tiny

IDS = torch.arange(3, 27).view(2, 12)
FINGERPRINT = {"source": "x", "options": {"seed": 0}}


class Subject:
    """An artefact with every file that can lie in its folder, and what is done with each."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.folder, self.work = root, root / "whole", root / "changed"
        source = root / "source"
        save_tiny("olmoe", source)
        calibration = CalibrateOptions(text=str(text), tokens=512, length=32, reservoir=128)
        options = RefactorOptions(calibration=calibration, compensate="mean", extra_scorers=["low-rank"])
        calibrate_model(source, root / "statistics", calibration)
        refactor(source, self.folder, options, calibration=root / "statistics")
        point = FULL.with_budget(0.5)
        write_point(self.folder / "plan.json", NamedPoint(name="half", point=point))
        measured = measure_frontier(self.folder, FrontierOptions(text=str(text), tokens=64, length=32, rules=["product"]))
        measured.save(self.folder / "frontier.json")
        self.model, _ = load(self.folder, store=StoreOptions(1 << 28))  # writes experts.pack
        levels = [{"name": "half", "point": point.to_json(), "slots": 4.0, "quality": 0.5}]
        (self.folder / "ladder.json").write_text(json.dumps({"levels": levels, "tokens": 64, "text": "t"}))
        cost = CostModel(LayerFacts(4, 4, 2), Coefficients(*([0.1] * 8)))
        cost.save(self.folder / "cost.json")
        record_trace(self.folder, self.folder / "trace.npz", TraceOptions(text=str(text), tokens=64), force=True)
        kept = select_experts(self.folder, PruneOptions(keep=0.5, criterion="first-half", protect=[]))
        (self.folder / "kept.json").write_text(json.dumps(kept.selection.to_json()))
        update_manifest(self.folder, {})
        (self.folder / "unfinished").mkdir()
        journal = Journal(self.folder / "unfinished", FINGERPRINT)
        (self.folder / "unfinished" / "unit").write_text("x")
        journal.finish("unit", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
        shutil.move(self.folder / "unfinished", root / "unfinished")
        self.layers = find_layers(self.model)
        self.full = slots_per_token(self.model._moe_prism)

    def logits(self, folder: Path, **how: Any) -> Any:
        """At half a budget and at all of it."""
        model, _ = load(folder, **how)
        elastic, found = model._moe_prism, []
        for point in (FULL.with_budget(0.5), FULL.with_budget(0.5, "product"), FULL):
            with torch.no_grad(), elastic.at([point]):
                found.append(model(IDS).logits)
        return torch.stack(found)

    def levels(self, folder: Path) -> Any:
        ladder, _ = find_ladder(folder, self.full, lambda _point: None)
        return None if ladder is None else [level.to_json() for level in ladder.levels]

    def uses(self) -> dict[str, Callable[[Path], Any]]:
        """file -> what is done with it: its result must not change unless all hashes are right."""
        return {
            "prism.json": lambda f: (self.logits(f), self.levels(f)),
            "prism.safetensors": self.logits,
            "ladder.json": lambda f: ((f / "frontier.json").unlink(), self.levels(f))[1],
            "frontier.json": self.levels,
            "plan.json": lambda f: [p.to_json() for p in read_points(f / "plan.json")],
            "cost.json": lambda f: CostModel.load(f / "cost.json").to_json(),
            "kept.json": lambda f: read_kept(f / "kept.json", self.model, self.layers).to_json(),
            "trace.npz": lambda f: load_trace(f / "trace.npz").header,
            "journal.json": lambda f: Journal(f, FINGERPRINT).units(),
            "experts.pack": lambda f: self.logits(f, store=StoreOptions(1 << 28)),
            "config.json": self.logits,
            "model.safetensors.index.json": self.logits,
            sorted(self.folder.glob("model-*.safetensors"))[0].name: lambda f: self.logits(f, verify=True),
            "layer-000.safetensors": lambda f: read_statistics(f).layers[0].flat(),
        }

    def home(self, name: str) -> Path:
        """The folder whose file is changed."""
        return {"journal.json": self.root / "unfinished", "layer-000.safetensors": self.root / "statistics"}.get(
            name, self.folder
        )


LOOSE = ("plan.json", "cost.json", "kept.json", "trace.npz", "journal.json")
"""Files that stand alone: no hash says what they were, and what is in range is taken."""


def trial(subject: Subject, name: str, mutation: Mutation, wanted: Any) -> tuple[str, str]:
    """(outcome, what went wrong)."""
    home, work = subject.home(name), subject.work
    for file in work.iterdir():
        file.unlink()
    for file in home.iterdir():
        if file.name == name or file.suffix in (".json", ".npz"):
            shutil.copyfile(file, work / file.name)
        else:
            os.link(file, work / file.name)
    mutation.apply(work / name)
    if (work / name).read_bytes() == (home / name).read_bytes():
        return "unchanged", ""
    if mutation.signed:
        sign(work, name)
    try:
        found = subject.uses()[name](work)
    except PrismError as error:
        line = str(error)
        return (
            ("refused", "") if "\n" not in line and error.next_step else ("defect", f"no line with a next step: {line[:300]!r}")
        )
    except BaseException:  # noqa: BLE001 - whatever it is, it is a defect
        return "defect", traceback.format_exc()[-1500:]
    if alike(found, wanted):
        return "same result", ""
    return ("in range", "") if mutation.signed or name in LOOSE else ("defect", "accepted, with another result")


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    return bool(a == b)


def run(subject: Subject, name: str, examples: int) -> dict[str, Any]:
    """Outcomes of so many changes of one file."""
    counts: Counter[str] = Counter()
    defects: list[str] = []
    subject.work.mkdir(exist_ok=True)
    for file in subject.work.iterdir():
        file.unlink()
    for file in subject.home(name).iterdir():
        shutil.copyfile(file, subject.work / file.name)
    wanted = subject.uses()[name](subject.work)

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations)
    def every(mutation: Mutation) -> None:
        outcome, what = trial(subject, name, mutation, wanted)
        counts[outcome] += 1
        if what:
            defects.append(f"{mutation}: {what}")

    every()
    return {"file": name, **counts, "defects": defects}


def main() -> None:
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    only = sys.argv[2:]
    torch.set_num_threads(1)
    bounds.install()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.py"
        shutil.copyfile(json.__file__, text)
        text.write_text(text.read_text() * 8)
        subject = Subject(Path(scratch), text)
        for name in subject.uses():
            if not only or name in only:
                sys.stdout.write(json.dumps(run(subject, name, examples)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()

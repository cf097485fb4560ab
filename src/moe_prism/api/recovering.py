"""Win back quality that dropped blocks cost, without touching the model at full budget."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import Journal, OutputFolder, read_manifest, write_manifest
from ..data import Windows, token_windows
from ..elastic.repair import REPAIR
from ..errors import CorruptError, UsageError
from ..model import load_tokenizer
from ..recover.run import BUDGETS, equations, groups
from .loading import SIDE_FILE, load, read_tensors
from .output import check_apart, finished
from .progress import Report, peak_rss_bytes, silent

MEASURED = ("frontier.json", "report.html", "frontier.png")  # of the model as it was
FILLED_IN = ("schema", "versions", "files", "sha256")  # keys of a manifest that its writer sets


@dataclass(frozen=True)
class RecoverOptions:
    """bands: repaired copies of W_down per expert, each for a range of dropped blocks (at most N-1 of them differ).

    text: None is the text the model was calibrated on; its evaluation side is never used. tokens and length of the windows;
    memory for the normal equations of the layers that are summed together.
    """

    bands: int = 1
    text: str | None = None
    tokens: int = 65_536
    length: int = 512
    memory_mib: int = 4096

    def check(self) -> None:
        """Raises UsageError naming the option that is out of range."""
        for name, least in (("bands", 1), ("tokens", 1), ("length", 8), ("memory_mib", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small", f"give at least {least}")


@dataclass(frozen=True)
class Recovered:
    """The folder, its manifest, and the peak memory of this process."""

    folder: Path
    manifest: dict[str, Any]
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        facts = self.manifest["recovery"]
        return {
            "folder": str(self.folder),
            **{key: facts[key] for key in ("bands", "tokens", "resident_bytes", "resident_share")},
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def recover_model(
    folder: str | Path,
    out: str | Path,
    options: RecoverOptions | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    report: Report = silent,
) -> Recovered:
    """Write a copy of an elastic model that loses less below full budget: repaired W_down for experts that dropped blocks.

    Same weights, and at full budget the same function. An interrupted run continues with resume=True and ends in the same bytes.
    Raises UsageError, DoesNotFit or CorruptError before anything is written if the folder, text or options cannot work.
    """
    options = options or RecoverOptions()
    options.check()
    manifest = read_manifest(folder)
    _check(folder, manifest)
    check_apart(folder, out)
    bands = min(options.bands, manifest["n_sub"] - 1)
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    inputs = {"from": weights, "options": asdict(options)}
    if resume and (done := finished(out, {"kind": "elastic"})) and done.get("recovery", {}).get("inputs") == inputs:
        return Recovered(Path(out), done, peak_rss_bytes())
    model, _ = load(folder)
    plan = groups(model._moe_prism.layers, bands, options.memory_mib << 20)
    windows = _windows(folder, manifest, options)
    with OutputFolder(out, resume=resume, force=force) as output:
        journal = Journal(output.work, inputs)
        deltas = _fit(model, plan, windows, bands, output, journal, report)
        with report("write") as update:
            _copy(Path(folder), manifest, output, update)
        extra = sum(delta.nbytes for delta in deltas.values())
        facts = {
            "method": "repair",
            "inputs": inputs,
            "bands": bands,
            "budgets": list(BUDGETS),
            "text": windows.source,
            "tokens": windows.tokens,
            "resident_bytes": extra,
            "resident_share": round(extra / _expert_bytes(model, manifest), 4),
        }
        output.save_tensors(SIDE_FILE, {**read_tensors(Path(folder) / SIDE_FILE), **deltas}, {"format": "pt"})
        for i in range(len(manifest["layers"])):
            output.discard(_unit(i))
        result = write_manifest(output, _manifest(manifest, windows, facts))
        output.finish()
    return Recovered(Path(out), result, peak_rss_bytes())


def _check(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("kind") != "elastic":
        raise UsageError(f"'{folder}' is not an elastic model", "give the folder written by `moe-prism refactor`")
    if "recovery" in manifest:
        raise UsageError(f"'{folder}' is already repaired", "give the folder it was made from")


def _windows(folder: str | Path, manifest: Mapping[str, Any], options: RecoverOptions) -> Windows:
    text = manifest["calibration"]["text"] if options.text is None else options.text
    return token_windows(load_tokenizer(folder), text, "calibration", length=options.length, tokens=options.tokens)


def _fit(
    model: Any, plan: list[list[int]], windows: Windows, bands: int, output: OutputFolder, journal: Journal, report: Report
) -> dict[str, Tensor]:
    """D of every layer, named as in prism.safetensors; one journal unit per layer, written when its group has been summed."""
    elastic = model._moe_prism
    with report("repair") as update:
        for number, group in enumerate(plan):
            todo = [i for i in group if not journal.done(_unit(i))]
            if not todo:
                continue
            before, total = number * len(windows.ids), len(plan) * len(windows.ids)
            summed = equations(model, elastic, todo, windows.ids, bands, lambda n, _, b=before, t=total: update(b + n, t))  # type: ignore[misc]
            for i, normal in zip(todo, summed, strict=True):
                digest = output.save_tensors(_unit(i), {f"layers.{i}.{REPAIR}": normal.solve()})
                journal.finish(_unit(i), _unit(i), digest)
    found: dict[str, Tensor] = {}
    for i in range(len(elastic.layers)):
        found |= load_file(str(output.work / _unit(i)))
    return found


def _unit(layer: int) -> str:
    return f"repair-{layer:03d}.safetensors"


def _copy(folder: Path, manifest: Mapping[str, Any], output: OutputFolder, update: Any) -> None:
    """Every file of the elastic model but what is written anew or was measured on the model as it was."""
    names = [name for name in sorted(manifest["files"]) if name not in (*MEASURED, SIDE_FILE)]
    output.require_space(sum(manifest["files"][name]["bytes"] for name in names))
    for done, name in enumerate(names, 1):
        with (folder / name).open("rb") as source, output.stage(name) as file:
            shutil.copyfileobj(source, file)
        if output.hashes[name] != manifest["files"][name]["sha256"]:
            raise CorruptError(f"{folder / name} was changed (sha256 differs)", "restore the folder, or refactor again")
        update(done, len(names))


def _expert_bytes(model: Any, manifest: Mapping[str, Any]) -> int:
    layers = [layer.plan.layer for layer in model._moe_prism.layers]
    size: int = manifest["bytes_per_weight"]
    weights: int = sum(layer.num_experts * layer.parameters_per_expert() for layer in layers)
    return size * weights


def _manifest(old: Mapping[str, Any], windows: Windows, recovery: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the elastic model, with what was done to it. Text used here is calibration text too: no frontier may use it."""
    kept = {key: value for key, value in old.items() if key not in (*FILLED_IN, "operating_points")}
    documents = dict.fromkeys([*old["calibration"]["documents"], *windows.documents])
    return {**kept, "calibration": {**old["calibration"], "documents": list(documents)}, "recovery": dict(recovery)}

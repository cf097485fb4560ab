"""Make a quantized copy of an elastic model elastic: its weights stay as they are, what makes them elastic is carried over and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.load import SIDE_FILE, flat_side_tensors, side_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.options import CalibrateOptions
from ..checkpoint import (
    Journal,
    OutputFolder,
    Source,
    companion_facts,
    copy_companions,
    elastic_manifest,
    open_source,
    source_facts,
    write_manifest,
)
from ..checkpoint.companions import companions, licence
from ..checkpoint.manifest import WEIGHTS_FILE
from ..checkpoint.shards import INDEX
from ..data import Windows, token_windows
from ..elastic import LayerParts, attach
from ..elastic.rules.threshold import QUANTILES, kept_shares, pool_cutoffs
from ..elastic.side_tensors import CUTOFFS, SHARES
from ..errors import UsageError
from ..frontier.measure import measure
from ..model import find_layers, load_to_run, load_tokenizer, resolve
from ..model.hub import is_hub_name
from ..model.place import recorded
from ..options.adopt import AdoptOptions
from ..options.text import other_source
from ..point import OperatingPoint, SlotRule
from ..progress import peak_rss_bytes, silent
from ..result import Result
from .calibrate import discard_snapshots, run_pass
from .distance import TOKENS, distance_between, evaluation_windows
from .refactor_card import adopted_card
from .refactor_files import single_index
from .rehearsal import begin
from .resources import needed_by_adoption
from .same_order import Likeness, same_order
from .solve_layer import measured_cutoffs

HALF = 0.5
MEASURED = (
    "schema",
    "versions",
    "files",
    "sha256",
    "operating_points",
    "dequantized",
    "kept_format",
)  # of the elastic folder alone


@dataclass(frozen=True)
class Adopted(Result):
    """The folder, its manifest, and the peak memory of this process."""

    folder: Path
    manifest: dict[str, Any]
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Facts of the run as plain JSON values."""
        return {"folder": str(self.folder), **self.manifest["adopted"], "peak_rss_bytes": self.peak_rss_bytes}


def adopt(
    quantized: str | Path,
    elastic: str | Path,
    out: str | Path | None = None,
    options: AdoptOptions | None = None,
    **how: Unpack[Writing],
) -> Adopted:
    """Write an elastic folder with the weights of `quantized`, which another tool made from the folder `elastic`.

    out: default `<quantized>-elastic` beside it. Weight files are linked where the disk can, else copied; they are never changed.
    Raises UsageError before anything is written if shapes, order or scale of the weights are not those of `elastic`.

    >>> import moe_prism
    >>> few = moe_prism.AdoptOptions(tokens=1024)
    >>> done = moe_prism.adopt("quantized", "elastic", "adopted", few)  # `quantized`: made from `elastic`, here by no change at all
    >>> done.to_json()["kl"] < 1e-6
    True
    """
    options = options or AdoptOptions()
    options.check()
    manifest = elastic_manifest(elastic)
    where = resolve(quantized)
    if any(step["method"] == "repair" for step in manifest.get("recovery", [])):
        raise UsageError(f"'{elastic}' is repaired, and a repair is fitted to its weights", "give the folder it was made from")
    if out is None and is_hub_name(str(quantized)):
        raise UsageError(f"'{quantized}' lies in the hub's cache, where nothing is written", "give --out FOLDER")
    out = Path(out) if out else where.with_name(f"{where.stem if where.is_file() else where.name}-elastic")
    check_apart(where, out)
    check_apart(elastic, out)
    inputs = {"weights": source_facts(where)["files"], "from": source_facts(elastic)["files"], "options": recorded(options)}
    if how.get("resume") and (done := finished(out, {"kind": "elastic"})) and done.get("adopted", {}).get("inputs") == inputs:
        return Adopted(out, done, peak_rss_bytes())
    if where.is_file() and options.low_memory:
        raise UsageError(f"--low-memory needs a folder of safetensors files, not '{where.name}'", "leave it out")
    windows = _windows(Path(elastic), manifest, options)
    original = Weights(Path(elastic))
    weights = Weights(where, config=original.model.config if where.is_file() else None)
    alike = same_order(weights, original)
    linked = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists()).stat().st_dev == weights.path.stat().st_dev
    brought = weights.path.stat().st_size if where.is_file() else open_source(where).bytes
    settings = replace(_calibration(manifest), low_memory=options.low_memory)
    needed = needed_by_adoption(weights, settings, 0 if linked else brought)
    begin(needed, out, resume=how.get("resume", False), force=how.get("force", False))
    with OutputFolder(out, resume=how.get("resume", False), force=how.get("force", False)) as folder:
        _bring(where, Path(elastic), folder)
        work = folder.work / where.name if where.is_file() else folder.work
        report = how.get("report", silent)
        statistics = run_pass(work, windows, settings, folder, Journal(folder.work, inputs), report)
        side = side_tensors(elastic, len(original.layers))
        own = []
        for layer, tensors, mine in zip(weights.layers, side, statistics.layers, strict=True):
            with weights.loaded(layer):
                parts = LayerParts(layer, manifest["n_sub"], manifest["gates"], dict(tensors))
                own.append(measured_cutoffs(parts, mine))
        side = [{**tensors, **cutoffs} for tensors, cutoffs in zip(side, _pooled(own, manifest), strict=True)]
        discard_snapshots(folder)
        facts = _facts(manifest, weights, alike, inputs) | {"companions": _beside(where, Path(elastic))}
        facts["adopted"] |= _price(work, Path(elastic), windows, side, manifest, options)
        folder.save_tensors(SIDE_FILE, flat_side_tensors(side), {"format": "pt"})
        folder.write_bytes("README.md", adopted_card(facts, weights.model.config.model_type).encode())
        written = write_manifest(folder, facts)
        folder.finish()
    return Adopted(out, written, peak_rss_bytes())


def _calibration(manifest: Mapping[str, Any]) -> CalibrateOptions:
    """Options of the elastic folder's calibration, as far as this version knows them."""
    given, known = manifest["options"]["calibration"], {field.name for field in fields(CalibrateOptions)}
    return CalibrateOptions(**{name: value for name, value in given.items() if name in known})


def _windows(elastic: Path, manifest: Mapping[str, Any], options: AdoptOptions) -> Windows:
    calibration = _calibration(manifest)
    text = other_source(manifest["calibration"], options.text, options.text_field)
    return token_windows(load_tokenizer(elastic), text, "calibration", length=calibration.length, tokens=options.tokens)


def _bring(where: Path, elastic: Path, folder: OutputFolder) -> None:
    """Weights by link, what stands beside them, and from the elastic folder what is missing (a GGUF file brings neither)."""
    if where.is_file():
        folder.link(where, where.name)
        copy_companions(elastic, folder, open_source(elastic))  # its config.json, too: a GGUF file does not say all of it
        return
    source = Source(where)
    for shard in source.shards():
        folder.link(where / shard, shard)
    folder.write_bytes(INDEX, source.index_bytes() if source.index_file else single_index(where / source.shards()[0]))
    here = set(companions(where, source)[0])
    for name in companions(elastic)[0]:
        if name.startswith("tokenizer") and name not in here:
            folder.write_bytes(name, (elastic / name).read_bytes())
    copy_companions(where, folder, source)


def _beside(where: Path, elastic: Path) -> dict[str, Any]:
    """What a manifest says of the files beside the weights. Tools that quantize bring no model card: then the elastic folder's counts."""
    facts = companion_facts(where)
    return facts | {"licence": facts["licence"] or licence(elastic)}


def _pooled(own: list[Tensor], manifest: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Cutoffs that spend a budget across layers as the elastic folder does, where it knows what each layer costs, and their shares."""
    costs = [layer.get("sensitivity") for layer in manifest["layers"]]
    if None in costs:
        return [{CUTOFFS: cutoffs, SHARES: torch.linspace(0, 1, QUANTILES)} for cutoffs in own]
    pooled = pool_cutoffs(own, costs)
    return [{CUTOFFS: shared, SHARES: kept_shares(alone, shared)} for alone, shared in zip(own, pooled, strict=True)]


def _facts(manifest: Mapping[str, Any], weights: Weights, alike: Likeness, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """prism.json: the elastic folder's, with the weights that are here now."""
    facts = {key: value for key, value in manifest.items() if key not in MEASURED}
    likeness = {"cosine_mean": round(alike.mean, 6), "cosine_least": round(alike.least, 6)}
    adopted = {"format": weights.stored_as, "inputs": json.loads(json.dumps(inputs)), **likeness}
    if weights.path.is_file():
        facts[WEIGHTS_FILE] = weights.path.name
    return {**facts, "bytes_per_weight": weights.stored_bytes_per_weight, "adopted": adopted}


def _price(
    work: Path, elastic: Path, windows: Windows, side: list[dict[str, Tensor]], manifest: Mapping[str, Any], options: AdoptOptions
) -> dict[str, Any]:
    """KL to the elastic folder at full budget, and what half a budget costs the quantized model; on held-out windows of the text."""
    held = evaluation_windows(elastic, windows.text, windows.ids.shape[1])
    ids = held.ids if held else windows.ids[: max(1, TOKENS // windows.ids.shape[1])]
    quality = distance_between(elastic, work, ids)
    found = {"kl": round(quality.kl, 8), "kl_tokens": quality.tokens, "kl_text": "evaluation" if held else "calibration"}
    if options.low_memory:
        return found
    model = load_to_run(work)
    layers = find_layers(model)
    with torch.no_grad():
        attach(model, manifest["n_sub"], gates=manifest["gates"], tensors=side, layers=layers)
        half = measure(model, ids, [OperatingPoint(slots=SlotRule(rule="threshold", budget=HALF))])[0]
    return found | {"half_budget_kl": round(half.quality.kl, 8)}

"""`recover --method router`: train the router of a folder that `reslice` wrote, and write the same checkpoint with its new rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ..artefact.load import read_tensors
from ..artefact.output import Writing, check_apart, finished
from ..checkpoint import Journal, LayerStream, OutputFolder, check_listed, read_manifest, write_manifest
from ..checkpoint.companions import CONFIG, companion_facts
from ..compress.reslice.rows import RowsCheckpoint
from ..data import Windows, token_windows
from ..elastic import attach
from ..errors import UsageError
from ..model import load_model, load_tokenizer
from ..model.place import recorded
from ..options.recover import RecoverOptions
from ..options.text import other_source
from ..progress import peak_rss_bytes, silent
from ..recover.router import BATCH, RouterJob, train
from .recovered import FILLED_IN, Recovered
from .rehearsal import begin
from .reslice import KIND
from .reslice_card import resliced_card
from .resources import model_tree, needed_by_training

STATE = "router-state.safetensors"
"""Where a training that was interrupted goes on from."""


class _Ready(NamedTuple):
    """What is trained, on what, and by which settings."""

    folder: Path
    model: Any
    windows: Windows
    manifest: Mapping[str, Any]
    options: RecoverOptions


def recover_router(folder: str | Path, out: str | Path, options: RecoverOptions, **how: Unpack[Writing]) -> Recovered:
    """Write the checkpoint with a router that was trained at several K. It is another model at every K, the full one included.

    how: see `Writing`; an interrupted training goes on from its last state, to the same bytes. UsageError, DoesNotFit or CorruptError
    before OUT is visible.
    """
    manifest, resume, force = _manifest(folder), how.get("resume", False), how.get("force", False)
    check_apart(folder, out)
    check_listed(folder, manifest, [name for name in manifest["files"] if name == CONFIG or name.endswith(".safetensors")])
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    inputs = {"from": weights, "options": recorded(options)}
    done = finished(out, {"kind": KIND}) if resume else None
    if done and done.get("recovery", [{}])[-1].get("inputs") == inputs:
        return Recovered(Path(out), done, peak_rss_bytes())
    tokenizer, tree = load_tokenizer(folder), model_tree(folder)
    windows = _windows(tokenizer, tree, manifest, options)
    written = sum(entry["bytes"] for entry in manifest["files"].values())
    begin(needed_by_training(tree, BATCH * windows.ids.shape[1], written), out, resume=resume, force=force)
    model = load_model(folder, torch.float32)
    ready = _Ready(Path(folder), model, windows, manifest, options)
    with OutputFolder(out, resume=resume, force=force) as output:
        journal = Journal(output.work, inputs)
        values = _trained(ready, output, journal, how)
        facts = _facts(ready, inputs, list(values))
        with how.get("report", silent)("write") as update:
            RowsCheckpoint(LayerStream(folder), values).write(output, journal, update)
        output.discard(STATE)
        output.write_bytes("README.md", resliced_card(facts, model.config.model_type).encode())
        result = write_manifest(output, facts)
        output.finish()
    return Recovered(Path(out), result, peak_rss_bytes())


def _manifest(folder: str | Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND:
        raise UsageError(
            f"the router of '{folder}' chooses whole experts", "give a folder that `moe-prism refactor FOLDER --reslice` wrote"
        )
    if manifest.get("recovery"):
        raise UsageError(f"the router of '{folder}' has been trained already", "give the folder it was made from")
    return manifest


def _windows(tokenizer: Any, model: Any, manifest: Mapping[str, Any], options: RecoverOptions) -> Windows:
    text = other_source(manifest["calibration"], options.text, options.text_field)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or options.length
    windows = token_windows(tokenizer, text, "calibration", length=min(options.length, longest), tokens=options.tokens)
    if len(windows.ids) < BATCH:
        raise UsageError(
            f"{len(windows.ids)} windows are too few: a step takes {BATCH}", "give more --tokens or a smaller --length"
        )
    return windows


def _trained(ready: _Ready, output: OutputFolder, journal: Journal, how: Writing) -> dict[str, Tensor]:
    """The new router rows. The last state is a unit of the journal; that of the last step holds the result."""
    options, made = ready.options, ready.manifest["reslicing"]
    normalises = attach(ready.model, 1).normalises()

    def save(step: int, tensors: dict[str, Tensor]) -> None:
        journal.finish(STATE, output.save_tensors(STATE, {"step": torch.tensor(step), **tensors}))

    job = RouterJob(
        model=ready.model,
        ids=ready.windows.ids,
        lowest=made["experts_per_token"] // made["n_sub"],
        highest=made["experts_per_token"],
        normalises=normalises,
        steps=options.steps,
        loss=options.loss,
        curriculum=options.curriculum,
        rate=options.rate,
        seed=options.seed,
        state=read_tensors(output.work / STATE) if journal.done(STATE) else {},
        save=save,
        report=how.get("report", silent),
    )
    return train(job)


def _facts(ready: _Ready, inputs: Mapping[str, Any], trained: list[str]) -> dict[str, Any]:
    manifest, windows, options = ready.manifest, ready.windows, ready.options
    step = {
        "method": "router",
        "inputs": inputs,
        **windows.facts(),
        "tokens": windows.tokens,
        "resident_bytes": 0,
        "resident_share": 0.0,
        "steps": options.steps,
        "rate": options.rate,
        "seed": options.seed,
        "loss": options.loss,
        "curriculum": options.curriculum,
        "trained": trained,
    }
    kept = {key: value for key, value in manifest.items() if key not in FILLED_IN}
    documents = list(dict.fromkeys([*manifest["documents"], *windows.documents]))
    return {**kept, "companions": companion_facts(ready.folder), "documents": documents, "recovery": [step]}

"""`moe-prism adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.adapter import AdapterOptions
from .output import emit, note, progress


def adapter(
    model: str,
    /,
    *,
    base: str,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: AdapterOptions,
    force: bool = False,
    json: bool = False,
) -> None:
    """Keep of a fine-tune the experts that it changed, so that one server holds many fine-tunes of one model (ExpertWeave).

    `generate --adapter FOLDER` and `serve --adapter NAME=FOLDER` take what is written.

    Parameters
    ----------
    model: The fine-tuned checkpoint: a folder of safetensors.
    base: What it was fine-tuned from. The adapter runs on exactly these weights.
    out: Folder to write. It appears only when it is complete.
    force: Replace an existing output.
    json: One JSON object on stdout.
    """
    from ..jobs.adapter import make_adapter

    done = make_adapter(model, base, out, options, force=force, report=progress)
    facts = done.to_json()
    if done.left_out:
        note(f"left out, because an adapter holds experts alone: {len(done.left_out)} changed tensors")
    note(f"next: moe-prism generate {base} --prompt TEXT --adapter {out}")
    how = f"packed from {facts['whole_bytes'] / 1e6:.2f} MB" if facts["packed"] else "whole weights"
    emit(facts, f"{out}: {facts['experts']} tuned experts, {facts['bytes'] / 1e6:.2f} MB, {how}", json)

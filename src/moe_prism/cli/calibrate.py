"""`moe-prism calibrate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note, progress


def calibrate(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    text: str = "stdlib",
    tokens: int = 65_536,
    length: int = 512,
    reservoir: int = 2048,
    memory_mib: int = 4096,
    seed: int = 0,
    collectors: str = "counts,tokens",
    low_memory: bool = False,
    resume: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Run calibration text through a model once and keep bounded statistics that every `refactor` of it can use.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, or 'nano'.
    out: Folder to write. It appears only when it is complete.
    text: stdlib, topics, a file, a folder, a .jsonl file or a saved dataset. Its evaluation side is never used.
    tokens: Calibration tokens.
    length: Tokens per window.
    reservoir: Sampled tokens kept per expert.
    memory_mib: Limit for all statistics together; the reservoir shrinks to fit.
    seed: Seed of the sample.
    collectors: Comma-separated statistics to keep; see `moe-prism ls collectors`. refactor reads counts and tokens.
    low_memory: Keep one decoder layer in memory at a time.
    resume: Continue an interrupted pass; ends in the same bytes.
    force: Replace an existing output.
    json: One JSON object on stdout.
    """
    from ..calibrate.options import CalibrateOptions
    from ..jobs.calibrate import STARVED
    from ..jobs.calibrate import calibrate_model as run

    options = CalibrateOptions(text, tokens, length, reservoir, memory_mib, seed, low_memory, collectors.split(","))
    statistics = run(model, out, options, resume=resume, force=force, report=progress)
    starved = statistics.starved(min(STARVED, statistics.facts["capacity"]))
    facts = {
        "folder": str(out),
        "layers": len(statistics.layers),
        "tokens": statistics.facts["tokens"],
        "reservoir": statistics.facts["capacity"],
        "starved": [{"layer": layer, "expert": e, "tokens": n} for layer, e, n in starved],
    }
    for layer, e, n in starved[:5]:
        note(f"warning: expert {e} of layer {layer} was chosen for {n} sampled tokens only; refactor falls back to its weights")
    note(f"next: moe-prism refactor {model} --calibration {out} -o OUT")
    emit(facts, f"{out}: {facts['layers']} layers, {facts['tokens']} tokens, {len(starved)} starved experts", json)

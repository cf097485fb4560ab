"""`moe-prism adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.adopt import AdoptOptions
from .flags import Run
from .output import emit, note, progress
from .rehearsal import Rehearsal, show_rehearsal


def adopt(
    quantized: Path,
    /,
    *,
    elastic: Annotated[Path, Parameter(name="--from")],
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: AdoptOptions,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Make a quantized copy of an elastic model elastic. Another tool quantized it; its weights stay as they are.

    Parameters
    ----------
    quantized: Folder or .gguf file that was made from the folder of --from.
    elastic: The folder that `moe-prism refactor` wrote and another tool quantized.
    out: Folder to write, by default QUANTIZED-elastic. Weight files are linked where the disk can.
    """
    from ..jobs.adopt import adopt as write

    if rehearsal.dry_run:
        how = {"resume": run.resume, "force": run.force}
        return show_rehearsal(rehearsal, write, quantized, elastic, out, options, target=out, as_json=run.json, **how)
    done = write(quantized, elastic, out, options, resume=run.resume, force=run.force, report=progress)
    facts = done.to_json()
    note(f"next: moe-prism frontier {facts['folder']}")
    half = f", half budget {facts['half_budget_kl']:.5f} to its own full budget" if "half_budget_kl" in facts else ""
    emit(
        facts,
        f"{facts['folder']}: {facts['format']}, neurons in the order of '{elastic}' (cosine {facts['cosine_mean']:.4f}, least "
        f"{facts['cosine_least']:.4f}); KL to it {facts['kl']:.5f} at full budget{half}, {facts['kl_tokens']} tokens",
        run.json,
    )
    return None

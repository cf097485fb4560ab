"""`moe-prism refactor`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .output import emit, note, progress

GIB = 2**30


def refactor(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    n_sub: int = 4,
    gates: int = 1,
    solver: str = "alt",
    objective: str = "paper",
    gate_choice: str = "energy",
    dropped: int | None = None,
    compensate: str = "mean",
    rank: int = 2,
    text: str = "stdlib",
    tokens: int = 65_536,
    length: int = 512,
    reservoir: int = 2048,
    memory_mib: int = 4096,
    seed: int = 0,
    profile_tokens: int = 4096,
    extra_scorers: str = "",
    profile_points: int = 0,
    calibration: Path | None = None,
    low_memory: bool = False,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Cut every expert of a checkpoint into sub-experts; the result is the same model in the same files, made elastic.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, or 'nano'.
    out: Folder to write. It appears only when it is complete.
    n_sub: Sub-experts per expert (must divide the expert's neurons).
    gates: Gate neurons per sub-expert, computed for every candidate block.
    solver: Partition solver; see `moe-prism ls solvers`.
    objective: What the solver keeps together; see `moe-prism ls objectives`.
    gate_choice: How gate neurons are chosen; see `moe-prism ls gates`.
    dropped: Sub-experts the partition objective charges; default n-sub - 1.
    compensate: What makes up for dropped sub-experts: none, or a name of `moe-prism ls compensators`.
    rank: Rank of `--compensate low-rank`.
    text: Calibration text: stdlib, topics, a file, a folder, a .jsonl file or a saved dataset. Its evaluation side is never used.
    tokens: Calibration tokens.
    length: Tokens per window.
    reservoir: Sampled tokens kept per expert.
    memory_mib: Limit for all statistics together.
    seed: Seed of sampling and solvers. Same inputs and seed, same bytes.
    profile_tokens: Calibration tokens run once per layer to learn how to spend a budget across layers; 0 = every layer alike.
    extra_scorers: Predictors to fit beside the default one, e.g. low-rank; see `moe-prism ls scorers`.
    profile_points: Budgets at which every layer is run once more, to refine the rule `plan`; each takes as long as the profile.
    calibration: Folder written by `moe-prism calibrate`, instead of --text, --tokens, --length, --reservoir and --memory-mib.
    low_memory: Keep one decoder layer in memory at a time. No profile then: a budget is spent alike in all layers.
    resume: Continue an interrupted run; ends in the same bytes.
    force: Replace an existing output.
    dry_run: Print what it needs and exit; 3 if this machine cannot do it.
    json: One JSON object on stdout.
    """
    from ..calibrate.options import CalibrateOptions
    from ..jobs.refactor import RefactorOptions
    from ..jobs.refactor import refactor as run
    from ..jobs.refactor_resources import check_resources, resources_of

    options = RefactorOptions(
        n_sub,
        gates,
        solver,
        objective,
        gate_choice,
        dropped,
        seed,
        profile_tokens,
        compensate,
        rank,
        profile_points,
        CalibrateOptions(text, tokens, length, reservoir, memory_mib, seed, low_memory),
        [name for name in extra_scorers.split(",") if name],
    )
    if dry_run:
        needed = resources_of(model, options)
        sizes = {key: value for key, value in needed.items() if key.endswith("bytes")}
        parts = [
            f"  {key:20} {sizes.pop(key) / GIB:8.2f} GiB" for key in list(sizes) if key not in ("peak_memory_bytes", "disk_bytes")
        ]
        memory, disk = (f"{key:22} {value / GIB:8.2f} GiB" for key, value in sizes.items())
        lines = [memory, *parts, disk]
        if not json:  # shown even where it does not fit; stdout of --json holds one object, then that of the error
            emit(needed, "\n".join(lines), json)
        check_resources(needed, out)
        note("this machine has enough of both")
        if json:
            emit(needed, "", json)
        return
    result = run(model, out, options, calibration=calibration, resume=resume, force=force, report=progress)
    facts = result.to_json()
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['layers']} layers, {facts['n_sub']} sub-experts per expert, "
        f"partition cost {facts['partition_cost_share']:.3f} of the activation mass, "
        f"{facts['starved_experts']} starved experts, peak memory {facts['peak_rss_bytes'] / GIB:.2f} GiB",
        json,
    )

"""`moe-prism refactor`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options import Options, option
from ..options.refactor import RefactorOptions
from ..progress import Report
from .flags import Run
from .output import emit, note, note_left_out, progress
from .rehearsal import Rehearsal, show_rehearsal
from .texts import told_text

if TYPE_CHECKING:
    from ..artefact.output import Writing
    from ..jobs.refactor import Refactored

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Division(Options):
    """How the work is divided among processes or machines, and what they share."""

    calibration: Path | None = option(
        None, "Folder written by `moe-prism calibrate`, instead of --text, --tokens, --length, --reservoir and --memory-mib."
    )
    shard: str | None = option(
        None,
        "I/N: solve only the I-th of N parts of the layers, and write them beside --out for --join. Needs --calibration. All parts and "
        "--join take the same model and options.",
    )
    join: list[str] = option([], "Comma-separated --out of the parts: take their layers instead of solving them.")

    def check(self) -> None:
        super().check()
        if self.shard and self.join:
            raise UsageError("--shard and --join exclude each other", "join when all parts are there")
        if self.shard and self.calibration is None:
            raise UsageError(
                "--shard needs statistics that all parts share", "make them with `moe-prism calibrate`, give --calibration"
            )


def refactor(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: RefactorOptions,
    division: Division,
    reslice: bool = False,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Cut every expert of a checkpoint into sub-experts; the result is the same model in the same files, made elastic.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete.
    memory_mib: Limit for all statistics together.
    low_memory: Keep one decoder layer in memory at a time, with the hidden states of all text. The result is the same. Experts that do
        not fit lie in a file beside --out meanwhile.
    reslice: Write an elastic MODEL's sub-experts as experts of their own: N times as many, an ordinary checkpoint. Takes no other option.
    """
    if reslice:
        return _resliced(model, out, options, division, rehearsal, run)
    from ..jobs.refactor import refactor as write

    report: Report = progress
    calibration = division.calibration
    if calibration is None:
        told, report = told_text(model, options.calibration, "calibration text", "; its other files are left for evaluation")
        options = replace(options, calibration=told)
    if rehearsal.dry_run:
        given = {"calibration": calibration, "resume": run.resume, "force": run.force}
        if division.shard:
            from ..jobs.refactor import refactor_shard as solve

            part = (model, out, division.shard, options)
            return show_rehearsal(rehearsal, solve, *part, target=out, **given, as_json=run.json)
        return show_rehearsal(rehearsal, write, model, out, options, target=out, **given, as_json=run.json)
    how: Writing = {"resume": run.resume, "force": run.force, "report": report}
    if division.shard:
        return emit(*_one_part(model, out, options, division, how), run.json)
    done = _written(model, out, options, division, how)
    if done is None:  # the first process says what was done
        return None
    facts = done.to_json()
    note_left_out(facts["left_out"])
    if kept := facts["kept_format"]:
        note(
            f"{kept['format']} kept: {kept['requantized']} of {kept['weights']} matrices quantized again, relative error "
            f"{kept['relative_error']:.4f}, KL {kept['kl']:.5f} to the source ({kept['kl_tokens']} tokens)"
        )
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['layers']} layers, {facts['n_sub']} sub-experts per expert, "
        f"partition cost {facts['partition_cost_share']:.3f} of the activation mass, "
        f"{facts['starved_experts']} starved experts, peak memory {facts['peak_rss_bytes'] / GIB:.2f} GiB",
        run.json,
    )
    return None


def _resliced(model: str, out: Path, options: RefactorOptions, division: Division, rehearsal: Rehearsal, run: Run) -> None:
    from ..jobs.reslice import reslice

    if options != RefactorOptions() or division != Division():
        raise UsageError("--reslice takes MODEL as it was refactored, and no option of that", "give it --out alone")
    if rehearsal.dry_run:
        return show_rehearsal(rehearsal, reslice, model, out, target=out, resume=run.resume, force=run.force, as_json=run.json)
    facts = reslice(model, out, resume=run.resume, force=run.force, report=progress).to_json()
    note_left_out(facts["left_out"])
    note(f"next: moe-prism recover {out} --method router -o {out}-trained")
    emit(
        facts,
        f"{facts['folder']}: {facts['experts']} experts of {facts['width']} neurons, {facts['experts_per_token']} per token, "
        f"output weights times {facts['factor']}",
        run.json,
    )
    return None


def _written(model: str, out: Path, options: RefactorOptions, division: Division, how: Writing) -> Refactored | None:
    from ..jobs.calibrate_ranks import ranks
    from ..jobs.refactor import refactor as write
    from ..jobs.refactor_ranks import refactor_ranks

    if ranks() > 1 and not division.join:
        return refactor_ranks(model, out, options, calibration=division.calibration, **how)
    return write(model, out, options, calibration=division.calibration, shards=division.join, **how)


def _one_part(model: str, out: Path, options: RefactorOptions, division: Division, how: Writing) -> tuple[dict[str, Any], str]:
    """Solve it; what `emit` prints of it."""
    from ..jobs.refactor import refactor_shard

    assert division.shard is not None and division.calibration is not None
    facts = refactor_shard(model, out, division.shard, options, calibration=division.calibration, **how).to_json()
    note(f"next: moe-prism refactor {model} --join {out},... with the same options, when all parts are there")
    return facts, f"{facts['folder']}: layers {', '.join(map(str, facts['layers']))}"

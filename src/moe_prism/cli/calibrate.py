"""`moe-prism calibrate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import UsageError
from ..options import Options, option
from ..options.calibrate import CalibrateOptions
from ..progress import Report
from .flags import Run
from .output import emit, note, progress
from .rehearsal import Rehearsal, show_rehearsal
from .texts import told_text

if TYPE_CHECKING:
    from ..artefact.output import Writing
    from ..calibrate.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class PassOptions(Options):
    """What runs the model, and how the text is divided among processes or machines."""

    engine: Literal["transformers", "vllm"] = option(
        "transformers",
        "What runs the model. vllm: with all its kinds of parallelism, for models that fit nowhere else; from its own environment.",
    )
    engine_options: str | None = option(
        None, "With --engine vllm: JSON with arguments of its LLM class, such as '{\"tensor_parallel_size\": 8}'."
    )
    shard: str | None = option(
        None, "I/N: run only the I-th of N parts of the text, for --join. All parts and --join take the same model and options."
    )
    join: list[str] = option([], "Comma-separated --out of all parts: add their statistics up instead of running the model.")

    def check(self) -> None:
        super().check()
        if self.shard and self.join:
            raise UsageError("--shard and --join exclude each other", "join when all parts are there")
        if self.engine_options is not None and self.engine != "vllm":
            raise UsageError("--engine-options belongs to --engine vllm", "add it, or leave the options out")
        if self.engine == "vllm" and (self.shard or self.join):
            raise UsageError("vLLM divides the model, not the text", "leave --shard and --join out with --engine vllm")

    def arguments(self) -> dict[str, Any]:
        """Those of vLLM. UsageError for what is no JSON object."""
        if self.engine_options is None:
            return {}
        try:
            found = json.loads(self.engine_options)
        except ValueError as error:
            raise UsageError("--engine-options is no JSON", "write such as '{\"tensor_parallel_size\": 8}'") from error
        if not isinstance(found, dict):
            raise UsageError("--engine-options is no JSON object", "write such as '{\"tensor_parallel_size\": 8}'")
        return found


def calibrate(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: CalibrateOptions,
    runner: PassOptions,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Run calibration text through a model once and keep bounded statistics that every `refactor` of it can use.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete.
    resume: Continue an interrupted pass; ends in the same bytes.
    """
    from ..jobs.calibrate import calibrate_model

    report: Report = progress
    if not options.tasks:
        options, report = told_text(model, options, "calibration text")
    if rehearsal.dry_run and runner != PassOptions():
        raise UsageError("--dry-run knows what a whole pass in transformers needs", "leave --engine, --shard and --join out")
    if rehearsal.dry_run:
        return show_rehearsal(
            rehearsal, calibrate_model, model, out, options, target=out, as_json=run.json, resume=run.resume, force=run.force
        )
    how: Writing = {"resume": run.resume, "force": run.force, "report": report}
    statistics = _statistics(model, out, options, runner, how)
    if statistics is None:  # the first process says what was done
        return None
    facts = {"folder": str(out), **statistics.to_json()}
    if tasks := facts.get("tasks"):
        said = f"{tasks['answered']} tasks answered with {tasks['answer_tokens']} tokens, {tasks['ended']} of them to an end"
        note(f"{said}: {out / 'answers.jsonl'}")
        for reason, count in tasks.get("left_out", {}).items():
            note(f"left out: {reason} {count}")
    if runner.shard:
        note(f"next: moe-prism calibrate {model} --join {out},... with the same options, when all parts are there")
        emit(facts, f"{out}: part {runner.shard} of {facts['tokens']} tokens", run.json)
        return None
    starved = facts["starved"]
    for row in starved[:5]:
        few = f"expert {row['expert']} of layer {row['layer']} was chosen for {row['tokens']} sampled tokens only"
        note(f"warning: {few}; refactor falls back to its weights")
    note(f"next: moe-prism refactor {model} --calibration {out} -o OUT")
    emit(facts, f"{out}: {facts['layers']} layers, {facts['tokens']} tokens, {len(starved)} starved experts", run.json)
    return None


def _statistics(model: str, out: Path, options: CalibrateOptions, runner: PassOptions, how: Writing) -> Statistics | None:
    """Of all text, of a part of it, or of parts that are there."""
    from ..jobs.calibrate import calibrate_model, calibrate_part
    from ..jobs.calibrate_ranks import calibrate_ranks, ranks
    from ..jobs.join_calibrations import join_calibrations

    if runner.engine == "vllm":
        from ..serve.vllm.calibrate import calibrate_with_vllm

        return calibrate_with_vllm(model, out, options, runner.arguments(), **how)
    if runner.shard:
        return calibrate_part(model, out, runner.shard, options, **how)
    if runner.join:
        return join_calibrations(model, out, runner.join, options, **how)
    return (calibrate_ranks if ranks() > 1 else calibrate_model)(model, out, options, **how)

"""Train a model from a recipe, and write it as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..artefact.load import read_tensors
from ..artefact.output import Writing, finished
from ..checkpoint import Journal, OutputFolder, write_manifest
from ..checkpoint.companions import companion_facts
from ..errors import CorruptError
from ..forecast.work_time import Seconds
from ..model import resolve
from ..model.load import without_bars
from ..progress import Report, silent
from ..report.curve import curve_svg
from ..result import Result
from ..training.experts import NAME
from ..training.loop import Curve, Training
from ..training.processes import Processes, processes
from .rehearsal import begin
from .resources import FLOAT32, told
from .train_card import train_card
from .train_recipe import read_training
from .training_job import TrainingJob, licences

KIND = "trained"
STATES = ("state-0.safetensors", "state-1.safetensors")
"""In turn: one of them is whole whenever the run is killed."""
CURVE_FILE, CHART_FILE = "training.json", "training.svg"
NONE = -1
TIMED = 2  # steps of a rehearsal


@dataclass(frozen=True)
class Trained(Result):
    """What a training came to. facts: steps, tokens, parameters, the last losses; curve: of every step."""

    folder: Path
    facts: Mapping[str, Any]
    curve: Curve

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.facts}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per look at held-out text."""
        return [{"step": step, "held_out_loss": loss} for step, loss in self.curve.held]


def train(
    recipe: str | Path | Mapping[str, Any], out: str | Path, *, changes: Sequence[str] = (), **how: Unpack[Writing]
) -> Trained:
    """Train the model that a recipe describes, and write a checkpoint that transformers and every command load.

    recipe: a .yaml file, or what it would say; changes: KEY=VALUE, like model.active=2. how: see `Writing`; an interrupted training
    goes on from its last state, to the same losses to the bit. Raises UsageError, DoesNotFit or CorruptError before OUT is visible.

    >>> import moe_prism
    >>> shape = {"hidden": 16, "layers": 1, "heads": 1, "experts": 4, "width": 8, "active": 2, "context": 64}
    >>> recipe = {"architecture": "top-k", "model": shape, "text": ["topics"], "tokens": 4096, "steps": 2, "batch": 2, "length": 64}
    >>> moe_prism.train(recipe, "small").to_json()["steps"]
    2
    """
    job = TrainingJob(read_training(recipe, changes))
    with processes() as group:
        group.check(job.recipe.parts)
        return _trained(job, out, group, how)


def _trained(job: TrainingJob, out: str | Path, group: Processes, how: Writing) -> Trained:
    """The training by this process: the first one writes, the others compute."""
    inputs = job.inputs()
    resume, force = how.get("resume", False), how.get("force", False)
    done = finished(out, {"kind": KIND, "inputs": inputs}) if resume else None
    if done is not None:
        return Trained(Path(out), done["result"], _curve(Path(out)))
    training = job.training()
    training.processes = group
    if not group.writes:
        _follow(training, Path(out).expanduser())
        return Trained(Path(out), _facts(job, training), training.curve)
    begin(_needed(job, training.model), out, resume=resume, force=force, lasts=lambda: _lasts(job.training()))
    with OutputFolder(out, resume=resume, force=force) as output:
        journal = Journal(output.work, inputs)
        _run(training, output, journal, how.get("report", silent))
        facts = _facts(job, training)
        _write(job, training, output, facts)
        for name in STATES:
            output.discard(name)
        started = {} if job.recipe.start is None else {"companions": companion_facts(resolve(job.recipe.start))}
        about = {
            "kind": KIND, "source": job.facts.get("start", {"name": job.name, "files": {}}), "inputs": inputs,
            "training": job.recipe.model_dump(mode="json"), "result": facts, "documents": list(job.documents), **started,
        }  # fmt: skip
        output.write_bytes("README.md", train_card(about, training.model.config.model_type).encode())
        write_manifest(output, about)
        output.finish()
    return Trained(Path(out), facts, training.curve)


def _follow(training: Training, out: Path) -> None:
    """The steps of a process that writes nothing: from the state that the first one names."""
    number = training.processes.told(NONE)
    if number != NONE:
        training.restore(read_tensors(out.with_name(out.name + ".partial") / STATES[number]))
    training.run(lambda _state: None, lambda _step, _steps: None)


def _run(training: Training, output: OutputFolder, journal: Journal, report: Report) -> None:
    """All steps, from the newest state that is whole."""
    states = {number: read_tensors(output.work / name) for number, name in enumerate(STATES) if journal.done(name)}
    newest = max(states, key=lambda number: int(states[number]["step"]), default=NONE)
    if training.processes.told(newest) != NONE:
        training.restore(states[newest])

    def save(state: dict[str, Tensor]) -> None:
        name = STATES[training.step // training.recipe.keep_every % 2]
        journal.finish(name, output.save_tensors(name, state))

    with report("train") as update:
        training.run(save, update)


def _facts(job: TrainingJob, training: Training) -> dict[str, Any]:
    recipe, curve, exchange = job.recipe, training.curve, training.exchange
    last = curve.train[-max(1, len(curve.train) // 20) :]
    return {
        "steps": recipe.last,
        "tokens": recipe.last * recipe.batch * job.positions,
        "text_tokens": len(job.data[0]) if job.task is None else 0,
        "shape": job.shape_of(training.model),
        "data": job.data_names,
        "unit": job.unit,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "trained_parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "train_loss": round(sum(last) / len(last), 6),
        "held_out_loss": round(curve.held[-1][1], 6),
        **({} if exchange is None else {"sent_bytes": exchange.sent, "dense_bytes": recipe.parts * exchange.numbers * FLOAT32}),
    }


def _write(job: TrainingJob, training: Training, output: OutputFolder, facts: Mapping[str, Any]) -> None:
    """The checkpoint, its tokenizer and the curve. transformers writes into a folder of its own, whose files are taken over one by one."""
    model, aside = training.model, output.work / "saved.tmp"
    if getattr(model.config, "_experts_implementation", None) == NAME:
        raise CorruptError("the model still computes its experts for training", "report this")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if job.recipe.store == "bfloat16":
        model.to(torch.bfloat16)
    with without_bars():
        model.save_pretrained(aside)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(aside)
    kept = licences(resolve(job.recipe.start)) if job.recipe.start else []
    for path in (*sorted(aside.iterdir()), *kept):
        output.write_bytes(path.name, path.read_bytes())
    shutil.rmtree(aside)
    output.write_bytes(CURVE_FILE, json.dumps({"schema": 1, **training.curve.to_json()}).encode() + b"\n")
    chart = curve_svg(training.curve.train, training.curve.held, job.name, job.unit)
    if chart is not None:
        output.write_bytes(CHART_FILE, chart.encode())


def _curve(folder: Path) -> Curve:
    found = json.loads((folder / CURVE_FILE).read_bytes())
    return Curve(found["train"], [(row["step"], row["loss"]) for row in found["held_out"]])


def _needed(job: TrainingJob, model: Any) -> dict[str, Any]:
    """Weights with gradients and moments; activations that a step holds until it has gone backward; logits; two states and the result."""
    weights = sum(p.numel() for p in model.parameters()) * FLOAT32
    shape, tokens = job.shape_of(model), job.recipe.batch * job.positions
    row = 40 * shape["hidden"] + shape["experts"] * 8 + shape["active"] * (6 * shape["width"] + 4 * shape["hidden"])
    parts = {
        "weights_bytes": weights,
        "optimiser_bytes": 4 * weights,
        "activations_bytes": tokens * shape["layers"] * row * FLOAT32,
        "logits_bytes": 5 * tokens * job.vocabulary.size * FLOAT32,
        "data_bytes": 2 * job.data[0].numel() * FLOAT32,
    }
    return told(parts, 8 * weights)


def _lasts(training: Training) -> Seconds:
    """All steps, by the second of the first TIMED."""
    times: list[Seconds] = []
    steps = training.recipe.last
    stop: Callable[[int, int], None] = lambda _step, _steps: times.append(Seconds.now())  # noqa: E731
    training.recipe = training.recipe.model_copy(
        update={"steps": TIMED, "stop": None, "judge_every": TIMED + 1, "keep_every": TIMED + 1}
    )
    training.run(lambda _state: None, stop)
    return (times[-1] - times[-2]) * steps

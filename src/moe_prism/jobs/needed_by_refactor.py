"""What `refactor` will need, before it starts: of all layers at once, of one after the other, and of a part of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import bounded_capacity, declared_bytes
from ..calibrate.statistics import Statistics
from ..checkpoint.formats.requantize import TOGETHER as ROUNDED_TOGETHER
from ..frontier.measure import LOGIT_ROWS
from ..options.refactor import RefactorOptions
from .distance import LOGITS
from .expert_memory import ExpertMemory, experts_bytes, with_room
from .resources import (
    FLOAT32,
    KERNELS,
    LOGITS_HELD,
    RUNNING,
    SIZED_FOR,
    held_bytes,
    largest,
    largest_layer,
    needed_by_running,
    pass_parts,
    row_bytes,
    sampled_rows,
    text_config,
    told,
    written_bytes,
)
from .solve_layer import experts_together

SAMPLE_COPIES = 6  # of an expert's inputs: widened, as features in float64, those without the held-out ones
SYSTEM_COPIES = 5  # of its equations: products, those without the held-out rows, centred, and factorised


def needed_by(weights: Weights, options: RefactorOptions, given: Statistics | None = None) -> dict[str, Any]:
    """Declared peak memory and disk of `refactor` in bytes, by part, for options that fit the source. given: of an earlier pass."""
    if options.calibration.low_memory and weights.stream:
        return _needed_by_layers(weights, options, given)
    disk, kept = written_bytes(weights), 0
    if given:
        capacity, phases = given.facts["capacity"], [_solving(weights, given)]
    else:
        parts, kept, capacity = pass_parts(weights, options.calibration)
        solver = 4 * sampled_rows(weights, options.calibration, capacity) * largest_layer(weights).width * FLOAT32
        phases = [parts, {"weights_bytes": 3 * experts_bytes(weights), "statistics_bytes": kept, "solver_bytes": solver}]
        disk += 2 * kept  # a new snapshot of the statistics is complete before the one before it goes
    if options.profile_tokens:
        again = needed_by_running(weights.model, rows=options.calibration.length, cut=options.n_sub)
        phases.append({name: again[name] for name in RUNNING} | {"statistics_bytes": kept})
        phases = [{**phase, "kernels_bytes": KERNELS} for phase in phases]
    phases.append(_comparison(weights, options))
    return told(largest(phases), disk) | {"reservoir_tokens": capacity}


def needed_by_shard(weights: Weights, options: RefactorOptions, given: Statistics, layers: int) -> dict[str, Any]:
    """The same for solving so many layers, which are written and no model with them."""
    layer = largest_layer(weights)
    scorers = (1 + len(options.extra_scorers)) * options.n_sub * (2 * layer.hidden + 64)
    per_expert = 2 * layer.width + scorers + (layer.width * ROUNDED_TOGETHER if options.keep == "format" else 0)
    disk = layers * layer.num_experts * per_expert * FLOAT32
    solving = _solving(weights, given)

    def need(experts: ExpertMemory) -> dict[str, Any]:
        return told(largest([{"weights_bytes": experts.loading}, {**solving, "weights_bytes": experts.there}]), disk)

    return with_room(weights, need) | {"reservoir_tokens": given.facts["capacity"]}


def _solving(weights: Weights, given: Statistics) -> dict[str, int]:
    """A layer, read while statistics that lie on disk are, and what cutting its experts takes."""
    rows = max(sum(one.kept()) for one in given.outlines)
    return {
        "weights_bytes": experts_bytes(weights),
        "statistics_bytes": given_bytes(given),
        "solver_bytes": _solver_bytes(weights, rows, given.facts["capacity"]),
    }


def _needed_by_layers(weights: Weights, options: RefactorOptions, given: Statistics | None) -> dict[str, Any]:
    """The same for a refactoring that takes one decoder layer after the other: statistics are of one layer, hidden states of all text.

    Where that is more than there is, and the files allow it, a layer's experts lie on disk.
    """
    return with_room(weights, partial(_by_layers, weights, options, given))


def _by_layers(weights: Weights, options: RefactorOptions, given: Statistics | None, experts: ExpertMemory) -> dict[str, Any]:
    """given: then no text passes, the profile's alone."""
    run, layer, length = settings(options.calibration), largest_layer(weights), options.calibration.length
    capacity = given.facts["capacity"] if given else bounded_capacity([layer], run)
    profiled_tokens = min(options.profile_tokens, options.calibration.tokens)
    profiled = profiled_tokens * (1 + len(weights.layers) * (1 + options.profile_points))
    always = {
        "hidden_bytes": (0 if given else held_bytes(weights, options.calibration)) + 2 * profiled * layer.hidden * FLOAT32,
        "kernels_bytes": KERNELS if options.profile_tokens else 0,
    }
    runs = {"activations_bytes": min(options.calibration.tokens, run.batch * length) * row_bytes(weights.model, layer, length)}
    phases = [{"weights_bytes": experts.loading}]
    if given:
        phases.append({**_solving(weights, given), "weights_bytes": experts.there})
    else:
        gathered = {"weights_bytes": experts.there, "statistics_bytes": declared_bytes([layer], run, capacity)}
        pooled = declared_bytes([layer], replace(run, domains=()), capacity) if run.domains else 0
        rows = sampled_rows(weights, options.calibration, capacity)
        phases += [gathered | {"solver_bytes": _solver_bytes(weights, rows, capacity) + pooled}, gathered | runs]
    if options.profile_tokens:
        rows = min(profiled_tokens, max(1, LOGIT_ROWS // length) * length)  # that run together, which is fewer than in the pass
        logits = LOGITS_HELD * rows * text_config(weights).vocab_size * FLOAT32
        activations = rows * row_bytes(weights.model, layer, length)
        phases.append({"weights_bytes": experts.profiled, "logits_bytes": logits, "activations_bytes": activations})
    phases = [{**always, **phase} for phase in phases]
    if weights.dequantized or weights.keep:
        # what readers freed is not all given back (docs/developer/log.md): as if all came at once
        phases = [{name: max(phase.get(name, 0) for phase in phases) for phase in phases for name in phase}]
    phases.append(_comparison(weights, options))
    return told(largest(phases), written_bytes(weights)) | {"reservoir_tokens": capacity}


def _solver_bytes(weights: Weights, rows: int, capacity: int) -> int:
    """An expert's sample and equations; the activations of those that are cut at a time: as they are, as wanted, and in the solver.

    rows: of all experts; capacity: at most so many of one.
    """
    layer = largest_layer(weights)
    there = SIZED_FOR.get()
    together = min(rows, experts_together(there.cores if there else None) * capacity)
    one = min(rows, capacity)
    system = SYSTEM_COPIES * 2 * min(one, layer.hidden) ** 2  # in float64
    return FLOAT32 * (one * (SAMPLE_COPIES * layer.hidden + layer.width) + system + 4 * together * layer.width)


def _comparison(weights: Weights, options: RefactorOptions) -> dict[str, int]:
    """Of a source in its own format, whose logits and those of what was written are compared."""
    layer, rows = largest_layer(weights), options.calibration.length * text_config(weights).vocab_size
    experts = 3 * layer.num_experts * layer.parameters_per_expert() * FLOAT32
    return {"weights_bytes": experts, "logits_bytes": 3 * max(LOGITS, rows) * FLOAT32} if options.keep else {}


def given_bytes(given: Statistics) -> int:
    """Of the largest layer's statistics, which are there one layer at a time."""
    return max(sum(v.nbytes for v in one.flat().values()) for one in given.outlines)

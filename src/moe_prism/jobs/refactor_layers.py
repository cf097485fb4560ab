"""Refactor a decoder layer at a time: calibration, solving and the profile of a layer while its weights are there, each read once.

The profile runs the model with one layer alone below full budget, for every layer. Such a run is the full model up to that layer, so its
layers before it are not computed again: they hand on what the full run gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..artefact.source import Weights
from ..artefact.streamed import StreamedElastic
from ..calibrate.layerwise import LayerwisePass
from ..calibrate.options import settings
from ..calibrate.run import profile_windows
from ..calibrate.statistics import LayerStatistics, Statistics
from ..data import Windows
from ..elastic import LayerParts
from ..elastic.bind import Step, bind
from ..frontier.measure import LOGIT_ROWS, Quality, logits_of
from ..model import MoELayer
from ..options.refactor import RefactorOptions
from ..progress import Report
from .calibrate import pass_facts
from .profile_layers import alone_points, profile_runs, spaced
from .solve_layer import PERM, WORKING


class Units(NamedTuple):
    """Solved layers. known: whether one is; read: what it holds; solve: with its weights in memory, which are left in the new order."""

    known: Callable[[MoELayer], bool]
    read: Callable[[MoELayer], dict[str, Tensor]]
    solve: Callable[[MoELayer, LayerStatistics], None]


class LayerwiseProfile:
    """KL and slots of every run of `profile_runs`, gathered while layers pass."""

    def __init__(self, weights: Weights, options: RefactorOptions, ids: Tensor) -> None:
        self.layers, self.options = weights.layers, options
        self.model = weights.model
        self.runs = profile_runs(options.profile_points)
        self.rows = torch.split(ids, max(1, LOGIT_ROWS // ids.shape[1]))
        parts = [LayerParts(layer, options.n_sub, options.gates) for layer in weights.layers]
        self.elastic = StreamedElastic(self.model, parts)
        for layer in weights.layers:
            layer.uninstall()
        self.kl = [[Quality() for _ in weights.layers] for _ in self.runs]
        self.slots = self._passed = 0
        self._source: Tensor | None = None
        self._keys = [(run, i) for i in range(len(weights.layers)) for run in range(len(self.runs))]

    def forwards(self) -> list[Callable[[Any], None]]:
        """Of every part of the text the full run, then each run with one layer alone."""
        found: list[Callable[[Any], None]] = []
        for rows in self.rows:
            found += [partial(self._full, rows), *(partial(self._alone, rows, run, layer) for run, layer in self._keys)]
        return found

    def _full(self, rows: Tensor, model: Any) -> None:
        self._source = logits_of(model, rows).log_softmax(-1)

    def _alone(self, rows: Tensor, run: int, layer: int, model: Any) -> None:
        logits = logits_of(model, rows)  # the full run of these rows ends between here and there
        assert self._source is not None
        self.kl[run][layer].add(self._source, logits, rows[:, 1:].reshape(-1))

    def through(self, name: str, here: Sequence[int], go: Callable[[int], None]) -> None:
        """Pass a decoder layer whose experts are solved. here: the MoE layers in it."""
        module = self.model.get_submodule(name)
        self._passed += len(here)
        for part in range(len(self.rows)):
            at = part * (1 + len(self._keys))
            given: list[Any] = []
            handle = module.register_forward_hook(lambda _m, _i, out, given=given: given.append(out))
            go(at)
            handle.remove()
            for number, (run, layer) in enumerate(self._keys, at + 1):
                if layer in here:
                    self._below_full(run, layer, partial(go, number))
                elif layer >= self._passed:
                    _instead(module, given[0], partial(go, number))
                else:
                    go(number)
        for i in here:
            self.elastic.layers[i].forget_weights()

    def _below_full(self, run: int, number: int, go: Callable[[], None]) -> None:
        """Pass a layer's own run with it alone at the budget."""
        rule, budget = self.runs[run]
        own = self.elastic.layers[number]
        point = alone_points(rule, budget, len(self.layers))[number]
        own.parts.layer.install(own)
        try:
            with self.elastic.at(Step(bind(self.elastic, [point]))), self.elastic.count():
                go()
        finally:
            own.parts.layer.uninstall()
        self.slots = own.counter.chosen // own.counter.tokens * own.parts.n_sub

    def solved(self, number: int, unit: dict[str, Tensor]) -> None:
        """What was fitted for a layer, from now on used."""
        self.elastic.layers[number].parts.tensors.update({k: v for k, v in unit.items() if k not in WORKING})

    def found(self) -> list[dict[str, Tensor]]:
        """{kl [L], slots} per run."""
        slots = torch.tensor(self.slots)
        return [{"kl": torch.tensor([q.kl for q in row], dtype=torch.float64), "slots": slots} for row in self.kl]


def _instead(module: Any, output: Any, go: Callable[[], None]) -> None:
    """Have a decoder layer give a known output."""
    module.forward = lambda *_a, **_k: output
    try:
        go()
    finally:
        del module.forward


def solve_layers(
    weights: Weights, text: Windows | Statistics, options: RefactorOptions, units: Units, report: Report
) -> tuple[Statistics, list[dict[str, Tensor]]]:
    """Solve every layer that is not known yet. Returns the pass, and the profile: {kl [L], slots} per run.

    text: what to calibrate on; the pass that is returned then holds no samples. Or statistics that are there.
    """
    stream = weights.stream
    assert stream is not None
    if isinstance(text, Statistics):
        windows, sample, given = text.profile[:0], text.profile, text.layers
    else:
        windows, sample, given = text.ids, profile_windows(text.ids), []
    work = LayerwisePass(stream, weights.layers, settings(options.calibration), together=False)
    profile = LayerwiseProfile(weights, options, spaced(sample, options.profile_tokens)) if options.profile_tokens else None

    def finish(i: int) -> None:
        layer = weights.layers[i]
        if units.known(layer):
            layer.permute(units.read(layer)[PERM])
        else:
            units.solve(layer, given[i] if given else work.gathered(i))
        if profile:
            profile.solved(i, units.read(layer))

    with report("layers") as update:
        work.run_layers(
            windows,
            finish,
            parts=() if isinstance(text, Statistics) else text.parts,
            known=lambda i: bool(given) or units.known(weights.layers[i]),
            others=profile.forwards() if profile else (),
            after=profile.through if profile else None,
            progress=update,
        )
    found = profile.found() if profile else []
    if isinstance(text, Statistics):
        return text, found
    facts = {"capacity": work.capacity, "windows": work.done, **pass_facts(work, text)}
    return Statistics([LayerStatistics(layer.name, {}) for layer in weights.layers], work.profile, facts), found

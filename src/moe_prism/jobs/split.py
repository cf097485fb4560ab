"""Write a dense model as a Mixture-of-Experts model that computes the same, and less where fewer experts run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import Qwen2MoeForCausalLM

from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.statistics import LayerStatistics, Statistics
from ..checkpoint import Journal, OutputFolder, source_facts, write_manifest
from ..compress.split import Deal, shared_neurons
from ..compress.split.router import error, fit_router, outputs, scaled
from ..compress.split.source import DenseTensors, shard_name, write_index
from ..compress.split.target import check_family, check_names, has_bias, layer_tensors, target_config, written_names
from ..data.bundled import DOMAINS
from ..errors import CorruptError, UsageError
from ..methods.split import splits
from ..methods.split.base import DenseSeen, SplitMethod
from ..model import resolve
from ..model.place import recorded
from ..options.split import SplitOptions
from ..progress import Report, peak_rss_bytes, silent
from ..result import Result
from ..schema.read import decode
from .calibrate import calibration_windows, check_fit, discard_snapshots, lasts, run_pass
from .rehearsal import begin
from .resources import needed_by_pass, written_bytes
from .split_card import split_card
from .split_check import dense_difference
from .which_text import with_text

KIND = "split"
COLLECTORS = ("neurons", "tokens")
HELD = 4  # of so many sampled tokens one judges the router and does not fit it


@dataclass(frozen=True)
class SplitModel(Result):
    """facts: widths, the error of every layer, and how far all experts together are from the dense model."""

    facts: Mapping[str, Any]
    folder: Path
    manifest: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `split --json` prints."""
        left = {"left_out": self.manifest["companions"]["left_out"]}
        return {"folder": str(self.folder), **self.facts, **left, "peak_rss_bytes": peak_rss_bytes()}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per layer."""
        return [{"layer": i, **row} for i, row in enumerate(self.facts["layers"])]


def split_model(model: str | Path, out: str | Path, options: SplitOptions | None = None, **how: Unpack[Writing]) -> SplitModel:
    """Write a dense model of Llama's kind as an ordinary Qwen2-MoE checkpoint, which unmodified transformers loads.

    Every MLP becomes a shared expert and routed ones, each a selection of its neurons. With all experts on, the output is the dense
    model's. The router is fitted by ridge regression on calibration text, without training. how: see `Writing`. Raises UsageError,
    DoesNotFit or CorruptError before anything is visible at `out`.

    >>> import moe_prism
    >>> moe_prism.split_model("nano", "split")
    Traceback (most recent call last):
    moe_prism.errors.UsageError: 'nano' has experts already; give a dense model
    """
    options = options or SplitOptions()
    options.check()
    job = _Job(model, options)
    check_apart(job.weights.path, out)
    inputs = {"source": source_facts(job.weights.path), "splitting": recorded(job.options)}
    resume, force, report = how.get("resume", False), how.get("force", False), how.get("report", silent)
    if resume and (done := finished(out, {"kind": KIND, **inputs})):
        return SplitModel(done["result"], Path(out), done)
    needed = needed_by_pass(job.weights, job.options.calibration, written_bytes(job.weights))
    forecast = partial(lasts, job.weights.path, job.windows, job.options.calibration, needed)
    begin(needed, out, resume=resume, force=force, lasts=forecast)
    with OutputFolder(out, resume=resume, force=force) as folder:
        journal = Journal(folder.work, inputs)
        facts = job.write(folder, journal, report)
        plain = {"dequantized": job.weights.dequantized} if job.weights.dequantized else {}
        about = {
            "kind": KIND, **inputs, "companions": job.weights.companions, **plain, "result": facts,
            "documents": list(job.windows.documents),
        }  # fmt: skip
        folder.write_bytes("README.md", split_card(about).encode())
        discard_snapshots(folder)
        manifest = write_manifest(folder, about)
        folder.finish()
    return SplitModel(facts, Path(out), manifest)


class _Job:
    """One dense model, what it becomes, and the text of the pass. UsageError, CorruptError or DoesNotFit before any long work."""

    def __init__(self, model: str | Path, options: SplitOptions) -> None:
        where = resolve(model)
        self.method: SplitMethod = splits.get(options.method)()
        calibration = replace(options.calibration, collectors=list(COLLECTORS))
        if self.method.needs_domains and not calibration.domains and calibration.text is None:
            calibration = replace(calibration, domains=[f"{name}=domains/{name}" for name in DOMAINS])
        if self.method.needs_domains and len(calibration.domains) < 2:
            raise UsageError(
                f"'{options.method}' compares domains", "name two or more: --domain code=FOLDER --domain prose=FOLDER"
            )
        share = self.method.shared if options.shared is None else options.shared
        self.active = options.active or options.experts
        self.options = replace(options, calibration=with_text(calibration, where), shared=share, active=self.active)
        self.weights = Weights(where, options.dtype)
        layers, config = self.weights.layers, self.weights.model.config
        if not all(layer.is_dense for layer in layers):
            raise UsageError(f"'{Path(model).name}' has experts already", "give a dense model")
        if len({layer.width for layer in layers}) != 1 or any(layer.gate is None for layer in layers):
            raise UsageError("the model's MLPs are not all of one width, with a gate", "give a model like Llama")
        self.shared = shared_neurons(layers[0].width, options.experts, share)
        seen = DenseSeen(neurons=options.experts, experts=options.experts, shared=0, importance=torch.ones(options.experts),
                         domains={name: torch.ones(options.experts) for name in calibration.named_domains})  # fmt: skip
        self.method.deal(seen)  # what it refuses it refuses now
        self.config = target_config(
            config, experts=options.experts, active=self.active, shared=self.shared, bias=has_bias(self.weights.model)
        )
        if self.weights.stream is None:
            self.config.dtype = self.weights.written
        check_family(config)
        with torch.device("meta"):
            target = Qwen2MoeForCausalLM(self.config)
        check_names(self.weights.model, target, {layer.name: layer for layer in layers})
        self.source = DenseTensors(self.weights.path, self.weights.stream, self.weights.model, layers, self.weights.written)
        self.windows = calibration_windows(where, self.options.calibration)
        check_fit(self.weights, self.options.calibration)

    def write(self, folder: OutputFolder, journal: Journal, report: Report) -> dict[str, Any]:
        """All files but the card and prism.json. A decoder layer is a unit of the journal."""
        statistics = run_pass(self.weights.path, self.windows, self.options.calibration, folder, journal, report)
        layers = self.weights.layers
        shards = [self._names(i) for i in range(len(layers))] + [self.source.beside(None)]
        with report("split") as update:
            for i in range(len(layers)):
                if not journal.done(_facts_name(i)):
                    self._layer(i, statistics.layers[i], folder, journal, shard_name(i, len(shards)))
                folder.hashes[shard_name(i, len(shards))] = journal.sha256(shard_name(i, len(shards)))
                update(i + 1, len(layers))
        rest = shard_name(len(layers), len(shards))
        if not journal.done(rest):
            journal.finish(rest, folder.save_tensors(rest, {n: self.source.tensor(n) for n in shards[-1]}, {"format": "pt"}))
        folder.hashes[rest] = journal.sha256(rest)
        write_index(folder, shards, sum((folder.work / shard_name(i, len(shards))).stat().st_size for i in range(len(shards))))
        self.source.copy_companions(folder)
        folder.write_bytes("config.json", self.config.to_json_string(use_diff=True).encode())
        rows = [_read_facts(folder, i) for i in range(len(layers))]
        for i in range(len(layers)):
            folder.discard(_facts_name(i))
        return self._facts(rows, statistics, folder)

    def _names(self, i: int) -> list[str]:
        return [*self.source.beside(i), *written_names(self.source.blocks[i], self.options.experts)]

    @torch.no_grad()
    def _layer(self, i: int, found: LayerStatistics, folder: OutputFolder, journal: Journal, shard: str) -> None:
        layer, block = self.weights.layers[i], self.source.blocks[i]
        seen = self._seen(i, found)
        deal = self.method.deal(seen)
        deal.check(layer.width)
        with self.weights.loaded(layer):
            router, facts = self._router(deal, i, found.inputs(0)[0])
            made = layer_tensors(block, layer, deal, router)
        written = self.source.type_of(f"{block}.up_proj.weight")
        tensors = {name: tensor.to(written) for name, tensor in made.items()}
        tensors |= {name: self.source.tensor(name) for name in self.source.beside(i)}
        journal.finish(shard, folder.save_tensors(shard, tensors, {"format": "pt"}))
        facts |= self.method.facts(seen)
        journal.finish(_facts_name(i), folder.write_bytes(_facts_name(i), json.dumps(facts).encode()))

    def _seen(self, i: int, found: LayerStatistics) -> DenseSeen:
        domains = {
            name: values["neurons"]["abs"][0] / values["neurons"]["tokens"].clamp(min=1) for name, values in found.domains.items()
        }
        return DenseSeen(
            neurons=self.weights.layers[i].width, experts=self.options.experts, shared=self.shared,
            importance=found.values["neurons"]["abs"][0], domains=domains, density=self.options.density,
            seed=self.options.calibration.seed, layer=i,
        )  # fmt: skip

    def _router(self, deal: Deal, i: int, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The fitted router (a draw for the method random), and the layer's squared error at the asked number of experts or half of all."""
        layer, experts = self.weights.layers[i], self.options.experts
        judged = torch.arange(len(x)) % HELD == 0
        added = outputs(layer, deal, x)
        draw = torch.randn(
            experts, layer.hidden, generator=torch.Generator().manual_seed(1000 * self.options.calibration.seed + i)
        )
        router = scaled(draw, x) if self.options.method == "random" else fit_router(x[~judged], added[~judged])
        active = self._judged_at
        held, whole = added[judged], layer.project(0, layer.activations(0, x[judged]))
        scores = {"error": router, "error_of_random_router": scaled(draw, x)}  # as the model ranks them, by their softmax
        return router, {n: error(held, (x[judged] @ own.T).softmax(-1), active, whole) for n, own in scores.items()}

    @property
    def _judged_at(self) -> int:
        """Experts per token at which errors are told: those that are active, or half where all are."""
        return self.active if self.active < self.options.experts else self.options.experts // 2

    def _facts(self, rows: list[dict[str, Any]], statistics: Statistics, folder: OutputFolder) -> dict[str, Any]:
        difference = dense_difference(self.weights, folder.work, statistics.profile, self.options.experts)
        return {
            "method": self.options.method,
            "experts": self.options.experts,
            "active": self.active,
            "neurons": self.weights.layers[0].width,
            "shared_neurons": self.shared,
            "expert_neurons": int(self.config.moe_intermediate_size),
            "errors_at": self._judged_at,
            "all_on_difference": difference,
            "tensors_left_out": self.source.left_out,
            "layers": rows,
        }


def _facts_name(layer: int) -> str:
    return f"split-{layer:03d}.json"


def _read_facts(folder: OutputFolder, layer: int) -> dict[str, Any]:
    path = folder.work / _facts_name(layer)
    found = decode(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise CorruptError(f"{path} holds no facts of a layer", "use --force to start again")
    return found

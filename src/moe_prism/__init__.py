"""moe-prism makes Mixture-of-Experts language models elastic: the same weights at any price between cheap and full quality.

Every command of `moe-prism` has its function here. Nothing prints: a function returns a `Result`, with `to_json`, `to_frame` and a table
for notebooks, or raises a `PrismError`. `report` of a long one hears of its progress.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .artefact.load import load
    from .bench.compare import bench_policies
    from .bench.single import bench_server
    from .cli.run_recipe import run_recipe
    from .elastic import operating_point
    from .errors import CorruptError, DoesNotFit, PrismError, UsageError
    from .frontier import Frontier
    from .frontier.runs import compare_runs
    from .jobs.adapter import make_adapter, with_adapters
    from .jobs.adopt import adopt
    from .jobs.calibrate import calibrate_model, calibrate_part, read_statistics
    from .jobs.compress import compress_model, measure_compression, plan_compression
    from .jobs.demo import run_demo
    from .jobs.doctor import check_machine
    from .jobs.evaluate import evaluate_model
    from .jobs.fit_offload import fit_offload
    from .jobs.forecast_offload import forecast_offload
    from .jobs.forecast_speed import forecast_speed
    from .jobs.frontier import measure_frontier
    from .jobs.frontier_files import add_tasks, keep_frontier, write_frontier
    from .jobs.generate import generate
    from .jobs.inspect import inspect_model
    from .jobs.join_calibrations import join_calibrations
    from .jobs.listing import list_choices
    from .jobs.patterns import write_patterns
    from .jobs.place import place_experts
    from .jobs.prune import prune_model, select_experts
    from .jobs.recover import recover_model
    from .jobs.refactor import refactor, refactor_shard
    from .jobs.rehearsal import rehearse
    from .jobs.reslice import reslice
    from .jobs.skip import make_skip_plan
    from .jobs.split import split_model
    from .jobs.time_points import Timing, time_frontier
    from .jobs.trace import inspect_routing, record_trace
    from .jobs.train import train
    from .jobs.verify import verify
    from .offload.trace import load_trace
    from .options.adapter import AdapterOptions
    from .options.adopt import AdoptOptions
    from .options.bench import CompareOptions, Offer, SingleOptions
    from .options.calibrate import CalibrateOptions
    from .options.compress import CompressOptions
    from .options.evaluate import EvaluateOptions
    from .options.fit import FitOptions
    from .options.frontier import FrontierOptions
    from .options.generate import GenerateOptions
    from .options.machine import OtherMachine
    from .options.offload import OffloadOptions
    from .options.placement import PlaceOptions
    from .options.prune import PruneOptions
    from .options.recover import RecoverOptions
    from .options.refactor import RefactorOptions
    from .options.route import RouteOptions
    from .options.serve import ServeOptions
    from .options.skip import SkipOptions
    from .options.speed import SpeedOptions
    from .options.split import SplitOptions
    from .options.trace import TraceOptions
    from .point import OperatingPoint
    from .result import Result
    from .serve.route.run import route_pool
    from .serve.server import serve_model

_HOME = {
    "check_machine": "jobs.doctor",
    "run_demo": "jobs.demo",
    "inspect_model": "jobs.inspect",
    "calibrate_model": "jobs.calibrate",
    "calibrate_part": "jobs.calibrate",
    "join_calibrations": "jobs.join_calibrations",
    "read_statistics": "jobs.calibrate",
    "refactor": "jobs.refactor",
    "refactor_shard": "jobs.refactor",
    "reslice": "jobs.reslice",
    "adopt": "jobs.adopt",
    "make_adapter": "jobs.adapter",
    "with_adapters": "jobs.adapter",
    "AdapterOptions": "options.adapter",
    "prune_model": "jobs.prune",
    "select_experts": "jobs.prune",
    "compress_model": "jobs.compress",
    "measure_compression": "jobs.compress",
    "plan_compression": "jobs.compress",
    "split_model": "jobs.split",
    "train": "jobs.train",
    "recover_model": "jobs.recover",
    "rehearse": "jobs.rehearsal",
    "evaluate_model": "jobs.evaluate",
    "EvaluateOptions": "options.evaluate",
    "compare_runs": "frontier.runs",
    "run_recipe": "cli.run_recipe",
    "make_skip_plan": "jobs.skip",
    "measure_frontier": "jobs.frontier",
    "keep_frontier": "jobs.frontier_files",
    "add_tasks": "jobs.frontier_files",
    "write_frontier": "jobs.frontier_files",
    "Timing": "jobs.time_points",
    "time_frontier": "jobs.time_points",
    "forecast_speed": "jobs.forecast_speed",
    "generate": "jobs.generate",
    "route_pool": "serve.route.run",
    "serve_model": "serve.server",
    "bench_server": "bench.single",
    "bench_policies": "bench.compare",
    "inspect_routing": "jobs.trace",
    "record_trace": "jobs.trace",
    "load_trace": "offload.trace",
    "forecast_offload": "jobs.forecast_offload",
    "fit_offload": "jobs.fit_offload",
    "write_patterns": "jobs.patterns",
    "place_experts": "jobs.place",
    "verify": "jobs.verify",
    "list_choices": "jobs.listing",
    "load": "artefact.load",
    "operating_point": "elastic",
    "OperatingPoint": "point",
    "Frontier": "frontier",
    "Result": "result",
    "CorruptError": "errors",
    "DoesNotFit": "errors",
    "PrismError": "errors",
    "UsageError": "errors",
    "AdoptOptions": "options.adopt",
    "CompareOptions": "options.bench",
    "Offer": "options.bench",
    "SingleOptions": "options.bench",
    "CalibrateOptions": "options.calibrate",
    "CompressOptions": "options.compress",
    "FitOptions": "options.fit",
    "FrontierOptions": "options.frontier",
    "GenerateOptions": "options.generate",
    "OffloadOptions": "options.offload",
    "OtherMachine": "options.machine",
    "PlaceOptions": "options.placement",
    "PruneOptions": "options.prune",
    "RecoverOptions": "options.recover",
    "RefactorOptions": "options.refactor",
    "RouteOptions": "options.route",
    "ServeOptions": "options.serve",
    "SkipOptions": "options.skip",
    "SpeedOptions": "options.speed",
    "SplitOptions": "options.split",
    "TraceOptions": "options.trace",
}

__all__ = [
    "AdapterOptions",
    "AdoptOptions",
    "CalibrateOptions",
    "CompareOptions",
    "CompressOptions",
    "CorruptError",
    "DoesNotFit",
    "EvaluateOptions",
    "FitOptions",
    "Frontier",
    "FrontierOptions",
    "GenerateOptions",
    "Offer",
    "OffloadOptions",
    "OperatingPoint",
    "OtherMachine",
    "PlaceOptions",
    "PrismError",
    "PruneOptions",
    "RecoverOptions",
    "RefactorOptions",
    "Result",
    "RouteOptions",
    "ServeOptions",
    "SingleOptions",
    "SkipOptions",
    "SpeedOptions",
    "SplitOptions",
    "Timing",
    "TraceOptions",
    "UsageError",
    "__version__",
    "add_tasks",
    "adopt",
    "bench_policies",
    "bench_server",
    "calibrate_model",
    "calibrate_part",
    "check_machine",
    "compare_runs",
    "compress_model",
    "evaluate_model",
    "fit_offload",
    "forecast_offload",
    "forecast_speed",
    "generate",
    "inspect_model",
    "inspect_routing",
    "join_calibrations",
    "keep_frontier",
    "list_choices",
    "load",
    "load_trace",
    "make_adapter",
    "make_skip_plan",
    "measure_compression",
    "measure_frontier",
    "operating_point",
    "place_experts",
    "plan_compression",
    "prune_model",
    "read_statistics",
    "record_trace",
    "recover_model",
    "refactor",
    "refactor_shard",
    "rehearse",
    "reslice",
    "route_pool",
    "run_demo",
    "run_recipe",
    "select_experts",
    "serve_model",
    "split_model",
    "time_frontier",
    "train",
    "verify",
    "with_adapters",
    "write_frontier",
    "write_patterns",
]


def __dir__() -> list[str]:
    return [*globals(), *_HOME]  # so that tab completion knows what has not been imported yet


def __getattr__(name: str) -> Any:
    """Import on first use: `moe-prism --help` must not pay for torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

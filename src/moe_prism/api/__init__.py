"""The Python API: one function per command, returning objects. Nothing here prints."""

from .calibration import CalibrateOptions, calibrate_model
from .inspection import inspect_model
from .loading import generate, load
from .measuring import FrontierOptions, measure_frontier
from .prune_plan import PruneOptions
from .pruning import plan_pruning, prune_model
from .recovering import RecoverOptions, recover_model
from .refactoring import RefactorOptions, refactor
from .tracing import TraceOptions, record_trace
from .verification import verify

__all__ = [
    "CalibrateOptions",
    "FrontierOptions",
    "PruneOptions",
    "RecoverOptions",
    "RefactorOptions",
    "TraceOptions",
    "calibrate_model",
    "generate",
    "inspect_model",
    "load",
    "measure_frontier",
    "plan_pruning",
    "prune_model",
    "record_trace",
    "recover_model",
    "refactor",
    "verify",
]

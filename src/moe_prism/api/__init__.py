"""The Python API: one function per command, returning objects. Nothing here prints."""

from .calibration import CalibrateOptions, calibrate_model
from .inspection import inspect_model
from .loading import generate, load
from .measuring import FrontierOptions, measure_frontier
from .recovering import RecoverOptions, recover_model
from .refactoring import RefactorOptions, refactor
from .tracing import TraceOptions, record_trace
from .verification import verify

__all__ = [
    "CalibrateOptions",
    "FrontierOptions",
    "RecoverOptions",
    "RefactorOptions",
    "TraceOptions",
    "calibrate_model",
    "generate",
    "inspect_model",
    "load",
    "measure_frontier",
    "record_trace",
    "recover_model",
    "refactor",
    "verify",
]

"""Write a checkpoint whose experts take fewer bits, have fewer neurons or were merged, or only say what that would save and lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from ..artefact.output import Writing
from ..errors import UsageError
from ..methods.find import method
from ..methods.merge.base import MergeMethod
from ..methods.neurons.base import NeuronMethod
from ..options.compress import CompressOptions
from ..progress import Report, silent
from .encode import Compressed, measure_codec, plan_codec, write_codec
from .merge import Merged, measure_merge, plan_merge, write_merge
from .slice import Sliced, measure_slice, plan_slice, write_slice


def plan_compression(
    model: str | Path, options: CompressOptions | None = None, *, calibration: str | Path | None = None
) -> Compressed | Sliced | Merged:
    """What would be written; no weight is read. calibration: see `compress_model`.

    >>> import moe_prism
    >>> found = moe_prism.plan_compression("nano", moe_prism.CompressOptions(method="rtn:bits=8"))
    >>> found.expert_bytes[1] < found.expert_bytes[0]
    True
    """
    options = options or CompressOptions()
    if (found := _method(options, calibration)) is not None:
        plan = plan_slice if isinstance(found, NeuronMethod) else plan_merge
        return plan(model, found, options, calibration)
    return plan_codec(model, options)


def measure_compression(
    model: str | Path,
    options: CompressOptions | None = None,
    *,
    calibration: str | Path | None = None,
    report: Report = silent,
) -> Compressed | Sliced | Merged:
    """The same, and how far the weights would move, or which neurons would go; nothing is written.

    >>> import moe_prism
    >>> asked = moe_prism.CompressOptions(method="rtn:bits=8")
    >>> moe_prism.measure_compression("nano", asked).relative_error < 1e-3  # squared, as a share of the weights' squares
    True
    """
    options = options or CompressOptions()
    if (found := _method(options, calibration)) is not None:
        measure = measure_slice if isinstance(found, NeuronMethod) else measure_merge
        return measure(model, found, options, calibration, report)
    return measure_codec(model, options, report)


def compress_model(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    calibration: str | Path | None = None,
    **how: Unpack[Writing],
) -> Compressed | Sliced | Merged:
    """Write the checkpoint, or the file of records, at `out`; how: see `Writing`.

    Raises UsageError, DoesNotFit or CorruptError before anything is visible there. calibration: a folder written by `calibrate` with the
    collectors that the method needs, instead of the text of the options.

    >>> import moe_prism
    >>> done = moe_prism.compress_model("nano", "int8", moe_prism.CompressOptions(method="rtn:bits=8"))
    >>> done.to_json()["method"]
    'rtn:bits=8'
    """
    options = options or CompressOptions()
    if (found := _method(options, calibration)) is not None:
        how.setdefault("report", silent)
        write = write_slice if isinstance(found, NeuronMethod) else write_merge
        return write(model, out, found, options, calibration, **how)
    return write_codec(model, out, options, **how)


def _method(options: CompressOptions, calibration: str | Path | None) -> Any:
    """The method that ranks neurons or merges experts, if it is one. UsageError for options that mean nothing to it."""
    options.check()
    found = None if options.format == "records" else method(options.method)
    if isinstance(found, NeuronMethod):
        options.check_neurons()
        return found
    if isinstance(found, MergeMethod):
        options.check_merging()
        return found
    if calibration:
        raise UsageError(
            f"--calibration means nothing to '{options.method}'",
            "leave it out, or give a method that ranks neurons or merges experts",
        )
    return None

"""Recorded routing: which experts and sub-experts every token used, replayable without the model.

Shapes: T tokens, L MoE layers, E experts, k experts per token, N sub-experts per expert, d hidden.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptError, UsageError
from ..files import replace_file
from ..result import Result
from ..schema import JsonBounds, decode
from ..schema import check as check_form
from ..schema.read import one_line
from ..schema.trace import AGAIN, TraceHeader
from .keys import KeySpace

FORMAT = 1
PREFILL, DECODE = 0, 1
HEADER = JsonBounds(bytes=1 << 20, values=10_000, keys=1000)
MOST_BYTES, MOST_RATIO = 8 << 30, 1000  # of all arrays unpacked, and to what is on disk
SIDES = ("calibration", "evaluation")
SHIPPED = Path(__file__).parent.parent / "nano" / "trace.npz"

Array = NDArray[Any]

_SHAPES = {
    # name: (kind of numbers, shape, optional)
    "expert_ids": ("i", "TLk", False),
    "weights": ("f", "TLk", False),
    "request": ("i", "T", False),
    "position": ("i", "T", False),
    "phase": ("i", "T", False),
    "step": ("i", "T", False),
    "side": ("i", "T", False),
    "token": ("i", "T", False),
    "kept": ("u", "TLk", True),
    "values": ("f", "TLkN", True),
    "logits": ("f", "TLE", True),
    "inputs": ("f", "TLd", True),
    "routers": ("f", "LEd", True),
}


@dataclass(frozen=True)
class Trace(Result):
    """One row per token, in the order of computation. Optional arrays are None where they were not recorded."""

    header: dict[str, Any]
    """format, model, experts (E), k, n_sub (N), layers (L), budget (of `kept`), text, and what the recorder adds."""
    expert_ids: Array  # int16 [T, L, k], -1 = the router chose none
    weights: Array  # float16 [T, L, k] as the experts received them
    request: Array  # int32 [T] which sequence
    position: Array  # int32 [T] in its sequence
    phase: Array  # int8 [T] PREFILL or DECODE
    step: Array  # int32 [T] forward pass, ascending; tokens of one step need their experts together
    side: Array  # int8 [T] index into SIDES: fit on calibration text, judge on evaluation text
    token: Array  # int32 [T] token id
    kept: Array | None = None  # unsigned [T, L, k] bit n = sub-expert n was kept; None: whole experts
    values: Array | None = None  # float16 [T, L, k, N] routing weight x predicted norm of every candidate slot
    logits: Array | None = None  # float16 [T, L, E] of the routers
    inputs: Array | None = None  # float16 [T, L, d] of the routers
    routers: Array | None = field(default=None, repr=False)  # float32 [L, E, d] weights, so that inputs can be looked at ahead

    def __len__(self) -> int:
        return len(self.step)

    @property
    def layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def experts(self) -> int:
        return int(self.header["experts"])

    @property
    def n_sub(self) -> int:
        return int(self.header["n_sub"])

    @cached_property
    def space(self) -> KeySpace:
        """Whole experts as keys."""
        return KeySpace(self.layers, self.experts)

    @cached_property
    def sub_space(self) -> KeySpace:
        """Sub-experts as keys."""
        return KeySpace(self.layers, self.experts, self.n_sub)

    def slots(self) -> Array:
        """K [T, L]: kept slots of every token."""
        if self.kept is None:
            return np.asarray((self.expert_ids >= 0).sum(2) * self.n_sub)
        bits = np.where(self.expert_ids >= 0, self.kept, 0).astype(np.uint32)
        return np.asarray(((bits[..., None] >> np.arange(self.n_sub, dtype=np.uint32)) & 1).sum((2, 3)))

    def to_json(self) -> dict[str, Any]:
        """How much of what was recorded."""
        return {
            "tokens": len(self),
            "requests": int(self.request.max()) + 1,
            "layers": self.layers,
            "experts": self.experts,
            "k": self.k,
            "n_sub": self.n_sub,
            "slots_per_token": float(self.slots().mean()),
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A row per layer and expert: the tokens that chose it."""
        return [
            {"layer": i, "expert": e, "tokens": int((self.expert_ids[:, i] == e).sum())}
            for i in range(self.layers)
            for e in range(self.experts)
        ]

    def rows(self, chosen: Array) -> Trace:
        """The trace of some rows: a bool mask or indices in the wanted order."""
        arrays: dict[str, Any] = {n: getattr(self, n) for n in _SHAPES if n != "routers"}
        picked: dict[str, Any] = {n: None if a is None else a[chosen] for n, a in arrays.items()}
        return replace(self, **picked)

    def part(self, side: str) -> Trace:
        """The rows of one side; UsageError if there are none."""
        if side not in SIDES:
            raise UsageError(f"a trace has no side '{side}'", f"choose one of: {', '.join(SIDES)}")
        chosen = self.side == SIDES.index(side)
        if not chosen.any():
            raise UsageError(f"the trace has no {side} tokens", "record one with `moe-prism trace`")
        return self.rows(chosen)

    def decode(self) -> Trace:
        """The rows of the decode phase."""
        return self.rows(self.phase == DECODE)

    def save(self, path: str | Path) -> None:
        """Write an .npz file, at once or not at all."""
        arrays = {n: getattr(self, n) for n in _SHAPES if getattr(self, n) is not None}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=np.frombuffer(json.dumps(self.header).encode(), np.uint8), **arrays)
        replace_file(Path(path), buffer.getvalue())


def load_trace(path: str | Path) -> Trace:
    """Read and check an .npz file; `nano` is the trace shipped with the package. UsageError or CorruptError in one line.

    >>> import moe_prism
    >>> moe_prism.load_trace("nano").to_json()["layers"]
    6
    """
    path = SHIPPED if str(path) == "nano" else Path(path)
    if not path.is_file():
        raise UsageError(f"trace '{path}' does not exist", "record one with `moe-prism trace MODEL -o trace.npz`, or give 'nano'")
    arrays = _arrays(path)
    raw = arrays.pop("header", np.zeros(0, np.uint8))
    if raw.dtype != np.uint8 or raw.nbytes > HEADER.bytes:
        raise CorruptError(f"'{path}' is no trace: its header is no text", AGAIN)
    header = decode(raw.tobytes(), f"{path}: header", AGAIN, HEADER)
    check_form(TraceHeader, header, f"{path}: header", AGAIN)
    unknown = sorted(set(arrays) - set(_SHAPES))
    missing = sorted(n for n, (_, _, optional) in _SHAPES.items() if not optional and n not in arrays)
    if unknown or missing:
        what = f"unknown array '{unknown[0]}'" if unknown else f"no array '{missing[0]}'"
        raise CorruptError(f"trace '{path}' has {what}", AGAIN)
    trace = Trace(header, **arrays)
    check(trace, str(path))
    return trace


def _arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file that is no zip bomb: few members, each as large as its own header says, all within bounds."""
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                packed, unpacked = (sum(getattr(m, size) for m in members) for size in ("compress_size", "file_size"))
            if len(members) > len(_SHAPES) + 1 or unpacked > MOST_BYTES or unpacked > MOST_RATIO * packed + (1 << 20):
                raise CorruptError(f"'{path}' is no trace: it would unpack to {unpacked} bytes in {len(members)} arrays", AGAIN)
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except CorruptError:
        raise
    except Exception as error:
        if not zipfile.is_zipfile(path):  # numpy would recommend to unpickle it
            raise CorruptError(f"'{path}' is no .npz file", AGAIN) from error
        first = one_line(next(iter(str(error).splitlines()), type(error).__name__), 160)
        raise CorruptError(f"'{path}' is no trace: {first}", AGAIN) from error


def check(trace: Trace, name: str = "trace") -> None:
    """CorruptError, in one line, for a trace that cannot be replayed."""
    check_form(TraceHeader, trace.header, f"{name}: header", AGAIN)
    problem = _problem(trace)
    if problem:
        raise CorruptError(f"{name}: {problem}", AGAIN)


def _problem(trace: Trace) -> str | None:
    header = trace.header
    lengths = {
        "T": trace.step.shape[0] if trace.step.ndim else 0,
        "L": header["layers"],
        "k": header["k"],
        "E": header["experts"],
    }
    lengths["N"] = header["n_sub"]
    if lengths["T"] == 0:
        return "it holds no tokens"
    for name, (kind, shape, _) in _SHAPES.items():
        array = getattr(trace, name)
        if array is None:
            continue
        wanted = tuple(lengths.setdefault(axis, array.shape[-1] if array.ndim else 0) for axis in shape)
        if array.shape != wanted:
            return f"'{name}' has shape {array.shape}, expected {wanted}"
        if array.dtype.kind != kind:
            return f"'{name}' holds {array.dtype}"
        if kind == "f" and not np.isfinite(array).all():
            return f"'{name}' holds values that are not finite"
    return _bad_values(trace)


def _bad_values(trace: Trace) -> str | None:
    if trace.expert_ids.min() < -1 or trace.expert_ids.max() >= trace.experts:
        return f"'expert_ids' leaves -1..{trace.experts - 1}"
    ordered = np.sort(trace.expert_ids, axis=2)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        return "'expert_ids' names an expert twice for one token"
    if (np.diff(trace.step) < 0).any():
        return "'step' is not ascending"
    if not set(np.unique(trace.phase)) <= {PREFILL, DECODE} or not set(np.unique(trace.side)) <= set(range(len(SIDES))):
        return "'phase' or 'side' holds an unknown number"
    if trace.kept is not None and int(trace.kept.max()) >> trace.n_sub:
        return f"'kept' marks sub-experts beyond {trace.n_sub}"
    return None

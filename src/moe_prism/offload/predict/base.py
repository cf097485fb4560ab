"""What a predictor may know, and how good its guesses are. Shapes: T tokens, L layers, E experts, k per token, d hidden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from ...errors import CorruptError, UsageError
from ..keys import KeySpace
from ..trace import Array, Trace

HISTORY = 4  # tokens before the current one
AGAIN = "fit it again: moe-prism offload fit TRACE"


@dataclass(frozen=True)
class Seen:
    """What is known of T tokens when layer `layer - 1` has its input: the prediction is for `layer`."""

    token: Array  # [T] ids
    history: Array  # [T, HISTORY] the ids before, nearest first, -1 where the sequence began
    expert_ids: Array  # [T, layer, k] of the layers so far, -1 = none
    inputs: Array | None  # [T, d] input of layer - 1; None for layer 0, or where inputs are not recorded


class Predictor(ABC):
    """Scores of a layer's experts before its router has run."""

    needs_inputs = False
    needs_fit = True
    """Whether it is of no use without the arrays of a fit."""
    first_layer = 0
    """The first layer there is a prediction for."""

    @classmethod
    @abstractmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        """Learn from the calibration side of a trace."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """What the fit found, as `from_arrays` takes it: float32 or int64 arrays by name."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        """The predictor that gave these arrays, for a model of this hidden size. CorruptError if they do not fit: see `checked`."""

    @abstractmethod
    def at(self, layer: int, seen: Seen) -> Array:
        """Scores [T, E], larger = more likely; only their order within a row means anything."""

    def scores(self, trace: Trace) -> Array:
        """[T, L, E] of a whole trace; zeros before `first_layer`."""
        past = history(trace)
        out = np.zeros((len(trace), trace.layers, trace.experts), np.float32)
        for layer in range(self.first_layer, trace.layers):
            inputs = trace.inputs[:, layer - 1].astype(np.float32) if layer and trace.inputs is not None else None
            out[:, layer] = self.at(layer, Seen(trace.token, past, trace.expert_ids[:, :layer], inputs))
        return out


def checked(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], whole: tuple[str, ...] = ()) -> dict[str, Array]:
    """Arrays from a file, once they have these names and shapes (0 = any length) and are finite.

    whole: those of int64, the others are of float32. CorruptError says what is wrong.
    """
    if set(arrays) != set(shapes):
        wrong = sorted(set(arrays) ^ set(shapes))[0]
        raise CorruptError(f"the predictor's array '{wrong[:60]}' is {'unknown' if wrong in arrays else 'missing'}", AGAIN)
    for name, shape in shapes.items():
        array, kind = arrays[name], np.int64 if name in whole else np.float32
        same = array.ndim == len(shape) and all(want in (0, got) for want, got in zip(shape, array.shape, strict=True))
        if not same or array.dtype != kind or 0 in array.shape:
            raise CorruptError(
                f"the predictor's array '{name}' is {array.dtype} {list(array.shape)}, not {np.dtype(kind)} {list(shape)}", AGAIN
            )
        if not np.isfinite(array).all():
            raise CorruptError(f"the predictor's array '{name}' holds values that are not finite", AGAIN)
    return dict(arrays)


def history(trace: Trace) -> Array:
    """[T, HISTORY] the token ids before every row, nearest first, -1 where unknown. Rows of several requests may take turns."""
    order = np.lexsort((trace.position, trace.request))  # stable: as they are, where each request's rows lie together
    request, position, token = trace.request[order], trace.position[order], trace.token[order]
    found = np.full((len(trace), HISTORY), -1, np.int64)
    for back in range(1, HISTORY + 1):
        same = request[back:] == request[:-back]
        found[back:, back - 1] = np.where(same & (position[back:] - position[:-back] == back), token[:-back], -1)
    out = np.empty_like(found)
    out[order] = found
    return out


def chosen(trace: Trace, layer: int) -> Array:
    """[T, E] 0/1: the experts of a layer every token used."""
    out = np.zeros((len(trace), trace.experts + 1), np.float32)
    np.put_along_axis(out, trace.expert_ids[:, layer].astype(np.int64), 1, axis=1)  # -1 lands in the spare column
    return out[:, :-1]


def recall(scores: Array, trace: Trace, width: int, first_layer: int = 0) -> float:
    """Share of chosen experts among the `width` best-scored of their layer, over layers from `first_layer` on."""
    found = total = 0.0
    width = min(width, trace.experts)
    for layer in range(first_layer, trace.layers):
        top = np.argpartition(-scores[:, layer], width - 1, axis=1)[:, :width] if width else np.zeros((len(trace), 0), int)
        used = chosen(trace, layer)
        found += float(np.take_along_axis(used, top, axis=1).sum())
        total += float(used.sum())
    return found / total if total else 1.0


def need_inputs(trace: Trace) -> tuple[Array, Array]:
    """inputs [T, L, d] and routers [L, E, d] of a trace that was recorded with them."""
    if trace.inputs is None or trace.routers is None:
        raise UsageError("the trace holds no router inputs", "record it with `moe-prism trace --inputs`")
    return trace.inputs, trace.routers

"""Which rows of a forward belong to which request, and what came before: read off the call of a transformers model.

Every row of the batch is a request. It begins where a position is 0, or where there is no cache; with a cache it goes on where the tokens
in it end, and what is known of it lies beside the cache. Tokens that the attention mask leaves out do not count. Tokens that are in the
cache but ran while no budget was held do not count either. Shapes: B rows, T tokens each, C columns of the cache, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache_names import given_cache, made_cache
from .bind import Step
from .control import Ints, Past, States
from .host import Host

ROOM = 64
"""Columns that a cache's states grow by at least."""
BESIDE = "_moe_prism_history"
NOTHING: Ints = np.zeros((0, 0), np.int64)


@cache
def _follow_at() -> Any:
    """Compiles when it is imported."""
    from ..kernels.requests import follow_at

    return follow_at


class RequestHistory:
    """States of every column of B rows, row after row; real [B, C] says which columns hold a token that counts."""

    def __init__(self, rows: int, layers: int) -> None:
        self.rows, self.columns = rows, 0
        self.states = States(0, layers)
        self.real = np.zeros((rows, 0), np.bool_)
        self.last = np.full(rows, -1)  # column of the last real token before `length`
        self.length = 0
        self._known: tuple[Any, ...] | None = None  # all of it, for the compiled function
        self._past: Past | None = None  # of as many rows as the last forward's
        self._kinds: tuple[Ints, int] = NOTHING, 0  # of the last forward, and their address

    def make_room(self, columns: int) -> None:
        """At least so many columns; what is there stays."""
        if columns <= self.columns:
            return
        wider = max(columns, 2 * self.columns, ROOM)
        old, states = self.columns, self.states
        self.states = states.like(self.rows * wider)
        for new, own in zip(self.states.arrays, states.arrays, strict=True):
            new.reshape(self.rows, wider, *own.shape[1:])[:, :old] = own.reshape(self.rows, old, *own.shape[1:])
        real = np.zeros((self.rows, wider), np.bool_)
        real[:, :old] = self.real
        self.real, self.columns, self._known = real, wider, None

    def cut(self, length: int) -> None:
        """Go on behind `length` columns, whatever was there: a cache may have been cropped, or have run without us."""
        if length != self.length:
            self.make_room(length)
            self.real[:, min(length, self.length) :] = False
            seen = np.where(self.real[:, :length], np.arange(length), -1)
            self.last, self._known = seen.max(1, initial=-1), None
            self.length = length

    def take(self, kinds: Ints, mask: Tensor | None, positions: Tensor | None) -> Past:
        """The rows of a forward over the next columns, their states begun; as `kernels.selection.follow` says. It holds until the next."""
        tokens = len(kinds) // self.rows
        self.make_room(self.length + tokens)
        if self._known is None:
            states = self.states
            arrays = self.real, self.last, states.sums, states.tokens
            sizes = self.rows, self.columns, states.sums.shape[1]
            record = np.array([*(a.ctypes.data for a in arrays), *sizes], np.int64)
            self._known, self._past = (record.ctypes.data, record, arrays), None
        if self._past is None or self._past.rows.shape[1] != len(kinds):
            rows = np.empty((3, len(kinds)), np.int64)
            self._past, self._rows = Past(rows, self.states), rows.ctypes.data
        if kinds is not self._kinds[0]:
            self._kinds = kinds, kinds.ctypes.data
        masked = (0, 0) if mask is None else (mask.data_ptr(), mask.shape[1])
        placed = (0, 0) if positions is None else (positions.data_ptr(), len(positions))
        _follow_at()(self._known[0], self.length, tokens, self._kinds[1], *masked, *placed, self._rows)
        self.states.begin(self._past.rows)
        self.length += tokens
        return self._past

    def chosen(self, index: Sequence[int]) -> RequestHistory:
        """The history of other rows: beams that went on, or copies."""
        new = RequestHistory(len(index), self.states.sums.shape[1])
        new.columns, new.length = self.columns, self.length
        new.real, new.last = self.real[index], self.last[index]
        new.states = self.states.like(len(index) * self.columns)
        for to, own in zip(new.states.arrays, self.states.arrays, strict=True):
            to[:] = own.reshape(self.rows, self.columns, *own.shape[1:])[index].reshape(to.shape)
        return new


class Watched:
    """Mixed into the class of a cache: where its rows go, their history goes."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(torch.arange(self.__dict__[BESIDE].rows)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(np.repeat(np.arange(self.__dict__[BESIDE].rows), repeats).tolist())

    def _move(self, index: Sequence[int]) -> None:
        self.__dict__[BESIDE] = self.__dict__[BESIDE].chosen(index)


_KINDS: dict[type[Any], type[Any]] = {}


def watched(kind: type[Any]) -> type[Any]:
    """The class of a cache with `Watched` in it, made once."""
    if kind not in _KINDS:
        _KINDS[kind] = type(kind.__name__, (Watched, kind), {"__module__": kind.__module__})
    return _KINDS[kind]


def put_beside(cache: Any, history: RequestHistory) -> None:
    """Keep a history with a cache from now on."""
    if BESIDE not in cache.__dict__:
        cache.__class__ = watched(type(cache))
    cache.__dict__[BESIDE] = history


@contextmanager
def followed(elastic: Host, backbone: nn.Module) -> Iterator[None]:
    """Give every step that follows its requests (`Bound.follows`) the past of its rows, for as long as a forward of the backbone runs."""
    layers = len(elastic.layers)
    mine: list[tuple[Step, RequestHistory]] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        step: Step = elastic.step
        if step.past is not None or not step.bound.follows:
            return
        shape = _shape(inputs, named)
        if shape is None:
            return
        kept = given_cache(named)
        length = 0 if kept is None else int(kept.get_seq_length())
        history = None if length == 0 else kept.__dict__.get(BESIDE)
        if history is None or history.rows != shape[0]:
            history = RequestHistory(shape[0], layers)
            if kept is not None:
                put_beside(kept, history)
        history.cut(length)
        kinds = step.kinds(shape[0] * shape[1])
        past = history.take(kinds, _mask(named.get("attention_mask"), shape), _positions(named.get("position_ids"), shape))
        step.past = past.checked() if step.bound.holds_several else past
        mine.append((step, history))

    def end(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if mine:
            step, history = mine.pop()
            step.past = None
            made = made_cache(output)
            if made is not None and made.__dict__.get(BESIDE) is not history:
                put_beside(made, history)

    handles = [
        backbone.register_forward_pre_hook(begin, with_kwargs=True),
        backbone.register_forward_hook(end, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shape(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, T) of what the model is called with."""
    for given in (named.get("input_ids"), named.get("inputs_embeds"), *inputs):
        if isinstance(given, Tensor) and given.ndim >= 2:
            return given.shape[0], given.shape[1]
    return None


def _mask(mask: object, shape: tuple[int, int]) -> Tensor | None:
    """[B, >= T]: 0 for tokens that the attention mask leaves out; None where it is of another kind, or leaves out none by its form."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
        return mask.to("cpu", torch.int64).contiguous()
    return None


def _positions(positions: object, shape: tuple[int, int]) -> Tensor | None:
    """[B or 1, T]: of the tokens; None where one alone goes on, or they are not said."""
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == shape[1] > 1:
        return positions.to("cpu", torch.int64).contiguous()
    return None

"""Budgets that hold: a request's dial moves with what its own past tokens kept, so that its mean is what was asked for.

The cutoffs of a rule are those of the calibration text; on other text more or fewer slots reach them. Let off(t) be by how much token t
kept more than was asked of it, over all layers up to this one, as a share of what was asked. A layer moves the log-odds of token t's
dial by

    learned - sum of off over the request's past tokens / (HORIZON x past tokens + HORIZON_AT_START)

where `learned` follows the request's own text, by -off / (past tokens + PRIOR) at every token. Learning alone would find the right dial
and leave the first tokens' excess; the second term pays that back, the more slowly the longer the request: a budget that is met at every
moment costs quality, since a token that needs much would be paid for by the next.

A layer sees only tokens before its own, and of those the layers up to itself: so it does not matter how a prompt is cut. The state of a
request after a token is kept where that token's keys and values are, so a prefix that is found again brings its own.
Shapes: T rows of a forward, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .dial import Spending

if TYPE_CHECKING:
    from ..kernels.selection import Held

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@cache
def compiled() -> ModuleType:
    """What compiles when it is imported."""
    from ..kernels import selection

    return selection


@dataclass(frozen=True)
class Holding:
    """What one layer holds a budget with. tables [2, Q]: at every position of the dial, the share of its slots that is asked for, and the
    share of all slots that is asked of the layers up to it. weight: its part in the bytes of all slots. strict: whether no token may pass
    the budget.
    """

    tables: Floats
    weight: float
    strict: bool


def holdings(found: Sequence[Spending], strict: bool) -> tuple[Holding, ...]:
    """Of every layer of a model."""
    total = sum(one.slots for one in found)
    asked, out = torch.zeros_like(found[0].share), []
    for one in found:
        weight = one.slots / total
        asked = asked + weight * one.share
        tables = torch.stack([one.share, asked.clamp(min=1e-6)]).float().contiguous()
        out.append(Holding(tables.numpy(), weight, strict))
    return tuple(out)


class States:
    """What requests are off by, after a token each: one state per place, of which there are as many as whoever runs them needs.

    notes: what routing stages know of the token of a place, [places, ...] each, zero where they know nothing.
    """

    def __init__(self, places: int, layers: int) -> None:
        self.sums = np.zeros((places, layers, 2), np.float32)
        self.tokens = np.zeros((places, 2), np.float32)
        self.notes: dict[str, NDArray[Any]] = {}

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All that goes with places, in one order for states of the same notes."""
        return (self.sums, self.tokens, *(self.notes[name] for name in sorted(self.notes)))

    def note(self, name: str, shape: tuple[int, ...], kind: type[np.generic]) -> NDArray[Any]:
        """The notes of a name, [places, *shape]; zeros at first."""
        if name not in self.notes:
            self.notes[name] = np.zeros((len(self.tokens), *shape), kind)
        return self.notes[name]

    def like(self, places: int) -> States:
        """As many zeros as it takes for so many places."""
        made = States(places, self.sums.shape[1])
        for name, own in self.notes.items():
            made.note(name, own.shape[1:], own.dtype.type)
        return made

    def begin(self, rows: Ints) -> None:
        """Tokens of a forward, rows as `Past` has them, take their places: what was noted there was of others."""
        if self.notes:
            places = rows[1][rows[1] >= 0]
            for own in self.notes.values():
                own[places] = 0

    def grow(self, places: int) -> None:
        """At least so many places; what is there stays."""
        more = places - len(self.tokens)
        if more > 0:
            wider = self.like(places)
            for new, own in zip(wider.arrays, self.arrays, strict=True):
                new[: len(own)] = own
            self.sums, self.tokens, self.notes = wider.sums, wider.tokens, wider.notes


@dataclass(eq=False)
class Past:
    """Where the states of a forward's rows are. rows [3, T]: place of the state before a row and of that after it, negative for none, and
    the number of the group that it is held by, 0 for none. Rows of one request are in the order of its tokens.
    """

    rows: Ints
    states: States

    @classmethod
    def of(cls, rows: Ints, states: States, several: bool) -> Past:
        """Of a forward that is about to run, the states of its rows begun (`kernels.selection.carry`).

        several: whether there may be rows of several groups. UsageError for a request whose tokens are held by two of them at once.
        """
        past = cls(rows, states)
        return past.checked() if several else past

    def checked(self) -> Past:
        """Itself. UsageError for a request whose tokens are held by two groups at once."""
        _check_apart(self.rows)
        return self

    @classmethod
    def unknown(cls, tokens: int, group: int) -> Past:
        """Of a layer that is called alone: every row is the first token of a request that nobody knows."""
        rows = np.full((3, tokens), -1, np.int64)
        rows[2] = group
        return cls(rows, States(0, 1))

    def part(self, which: Ints) -> Past:
        """Of some rows; those beyond the last are of requests that nobody knows. The others' states stay as they were begun."""
        rows = np.full((3, len(which)), -1, np.int64)
        rows[2] = 0
        known = which < self.rows.shape[1]
        rows[:, known] = self.rows[:, which[known]]
        return Past(rows, self.states)

    @cached_property
    def everyone(self) -> Ints:
        return np.arange(self.rows.shape[1])

    @cached_property
    def address(self) -> int:
        """Of a `kernels.whole_layer.PAST`, which is kept."""
        sums, tokens = self.states.sums, self.states.tokens
        cells = [self.rows.ctypes.data, self.rows.shape[1], sums.ctypes.data, tokens.ctypes.data, len(tokens), sums.shape[1]]
        self._record = np.array(cells, np.int64), self.rows, sums, tokens
        return self._record[0].ctypes.data


class HeldRows(NamedTuple):
    """What a budget is held with at one layer. group: its number. own [S]: which rows of the forward it is of; None: all of them."""

    past: Past
    holding: Holding
    layer: int
    group: int
    own: Tensor | None = None

    @property
    def arrays(self) -> Held:
        """For the compiled selection."""
        past, holding = self.past, self.holding
        rows = past.everyone if self.own is None else self.own.numpy()
        return compiled().Held(  # type: ignore[no-any-return]
            past.rows, rows, past.states.sums, past.states.tokens, holding.tables, holding.weight, self.layer, self.group,
            holding.strict,
        )  # fmt: skip


def _check_apart(rows: Ints) -> None:
    """A group's rows are seen one after the other, before those of the next group: a request cannot have some of each."""
    group = dict(zip(rows[1].tolist(), rows[2].tolist(), strict=True))
    for before, own in zip(rows[0].tolist(), rows[2].tolist(), strict=True):
        if before >= 0 and own and group.get(before, own) not in (0, own):
            raise UsageError("one request runs at two kinds of point whose budgets are held", "give all its tokens the same kind")


def keep_held(values: Tensor, cutoffs: Tensor, dial: Tensor, valid: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """(keep [S, k, N], dials reached [S]) for values [S, k, N] that are not of the compiled kind: on a GPU it is waited for."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError("a budget that is held cannot be captured in a CUDA graph", "use a point with control 'none'")
    keep, reached = np.empty(values.shape, np.bool_), dial.detach().cpu().float().clone().numpy()
    own, cut = (t.detach().cpu().float().contiguous().numpy() for t in (values, cutoffs))
    compiled().mark_held(own, cut, reached, valid.cpu().contiguous().numpy(), held, keep)
    return torch.from_numpy(keep).to(values.device), torch.from_numpy(reached).to(values.device)

"""Which token ids a model is called with, and which came before them: what predictors may know of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..cache_names import given_cache
from ..offload.predict.base import HISTORY

Ints = NDArray[np.int64]


class TokenWatch:
    """The ids of the newest call of a model, by a hook. Ids before it are known while its cache continues with the same rows.

    A server that forms its batches anew at every step continues no cache as it is meant here: it says what came before (`tell`).
    told: called with the number of tokens when a step's ids are known.
    """

    def __init__(self, model: Any) -> None:
        self._token: Ints = np.zeros(0, np.int64)
        self._history: Ints = np.zeros((0, HISTORY), np.int64)
        self._last: Ints = np.zeros((0, HISTORY), np.int64)  # of every row, nearest first
        self._length = 0  # of the cache after the newest call
        self._given: Ints | None = None
        self.told: Callable[[int], None] | None = None
        self.handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def tell(self, history: Ints) -> None:
        """What came before every row of the next call [T, HISTORY], nearest first, -1 where nothing did."""
        self._given = history

    def of(self, tokens: int) -> tuple[Ints, Ints]:
        """(ids [T], history [T, HISTORY]) of the step that runs, -1 where unknown; all of it for a batch of another size."""
        if len(self._token) != tokens:
            return np.full(tokens, -1, np.int64), np.full((tokens, HISTORY), -1, np.int64)
        return self._token, self._history

    def _note(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._look(inputs, named)
        given, self._given = self._given, None
        if given is not None and len(given) == len(self._token):
            self._history = given
        if self.told is not None and len(self._token):
            self.told(len(self._token))

    def _look(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            self._token, self._last, self._length = np.zeros(0, np.int64), np.zeros((0, HISTORY), np.int64), 0
            return
        rows, length = ids.shape
        kept = given_cache(named)
        before = 0 if kept is None else int(kept.get_seq_length())
        goes_on = before > 0 and before == self._length and len(self._last) == rows
        last = self._last if goes_on else np.full((rows, HISTORY), -1, np.int64)
        line = np.concatenate([last[:, ::-1], ids.cpu().numpy()], axis=1)  # [B, HISTORY + n], oldest first
        windows = np.lib.stride_tricks.sliding_window_view(line, HISTORY, axis=1)[:, :, ::-1]
        self._token = line[:, HISTORY:].reshape(-1)
        self._history = windows[:, :length].reshape(-1, HISTORY)
        self._last, self._length = windows[:, length], before + length

"""Attention of single queries over paged keys and values, read where they lie.

With torch alone the context of every request is gathered into a new tensor at every layer of every step, which costs several times
the attention itself. Each request is computed alone and in one order, so its result does not depend on the rest of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class PagedCache(NamedTuple):
    """Keys and values of one layer: block b of a request begins at row b * stride."""

    keys: Floats  # [rows, key heads, d]
    values: Floats
    page: int  # tokens of a block
    stride: int  # rows from one block to the next


class DecodeRows(NamedTuple):
    """The requests that decode."""

    query: Floats  # [D, heads, d]
    table: Ints  # [D, blocks] cache blocks of every request
    lengths: Ints  # [D] tokens to attend to
    out: Floats  # [D, heads, d] the result

    def part(self, piece: slice) -> DecodeRows:
        """Some of the requests. Views, contiguous like the whole, so that one compiled form serves both."""
        return DecodeRows(self.query[piece], self.table[piece], self.lengths[piece], self.out[piece])


# Not numba's own parallel loops: two engines in one process may call this at once, which its fallback thread pool answers with an
# abort. The interpreter lock is not held, so threads share the requests. Reassociation lets the inner loops use vector
# registers; NaN and infinity keep their meaning.
@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def decode_attention(rows: DecodeRows, cache: PagedCache, scale: float) -> None:
    """Token j of request r lies in row table[r, j // page] * stride + j % page of keys and values."""
    query, table, lengths, out = rows
    keys, values, page, stride = cache
    requests, heads, width = query.shape
    shared = heads // keys.shape[1]
    for r in range(requests):
        length = lengths[r]
        score = np.empty((heads, length), np.float32)
        for j in range(length):
            row = table[r, j // page] * stride + j % page
            for h in range(heads):
                total = np.float32(0)
                for x in range(width):
                    total += query[r, h, x] * keys[row, h // shared, x]
                score[h, j] = total * np.float32(scale)
        for h in range(heads):
            highest = score[h, 0]
            for j in range(1, length):
                highest = max(highest, score[h, j])
            total = np.float32(0)
            for j in range(length):
                score[h, j] = np.exp(score[h, j] - highest)
                total += score[h, j]
            for j in range(length):
                score[h, j] /= total
            for x in range(width):
                out[r, h, x] = 0
        for j in range(length):
            row = table[r, j // page] * stride + j % page
            for h in range(heads):
                weight = score[h, j]
                for x in range(width):
                    out[r, h, x] += weight * values[row, h // shared, x]

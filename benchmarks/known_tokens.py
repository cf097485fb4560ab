"""What the next tokens will need, where their ids are known and their routing is not: a speculative draft, or text to be read.

`cache.py --only drafts` measures it. No store uses it: what is known of a draft or a text is computed in one step, so all of it is
asked for at once, and nothing is known of the step after that.
"""

from __future__ import annotations

import numpy as np

from moe_prism.offload.keys import KeySpace
from moe_prism.offload.predict.base import chosen
from moe_prism.offload.predict.path import Path
from moe_prism.offload.predict.reuse import DECAY
from moe_prism.offload.trace import Array, Trace

TIE = 0.005  # weight of the aged count beside the prediction: it orders experts that no drafted token wants


def drafted(trace: Trace, path: Path, steps: int) -> Array:
    """Hints [T, L, E] for `reuse`: expected discounted first use, sum over j = 1..steps of 0.7^j p_j (1 - p_1) .. (1 - p_{j-1}).

    p_j is what the path predictor says of the id at position t + j. Rows are one token per step; beyond the end of a request the
    predictor's mean stands in.
    """
    p = 1 / (1 + np.exp(-path.scores(trace)))
    mean = p.mean(0)
    out, free = np.zeros_like(p), np.ones_like(p)
    for ahead in range(1, steps + 1):
        coming = np.broadcast_to(mean, p.shape).copy()
        same = np.flatnonzero(trace.request[ahead:] == trace.request[:-ahead])
        coming[same] = p[same + ahead]
        out += DECAY**ahead * coming * free
        free *= 1 - coming
    return out


def coefficients(space: KeySpace) -> list[tuple[float, ...]]:
    """The mix of `reuse` for these hints."""
    return [(0.0, TIE, 0.0, 1.0)] * space.layers


def oracle(trace: Trace, steps: int) -> Array:
    """The same with the true routing in place of the prediction: what a perfect path predictor would give."""
    used = np.stack([chosen(trace, layer) for layer in range(trace.layers)], axis=1)
    out, free = np.zeros_like(used), np.ones_like(used)
    for ahead in range(1, steps + 1):
        coming = np.zeros_like(used)
        coming[:-ahead] = used[ahead:]
        out += DECAY**ahead * coming * free
        free *= 1 - coming
    return out
